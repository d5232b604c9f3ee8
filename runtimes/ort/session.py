"""ONNX Runtime behind the protocol."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, Final

from ...stages.artifacts import TargetModel, TensorSpec
from ...stages.errors import BundleError, FeedError, ToolCrashed
from ...stages.onnx_file import FLOAT16, INT8, UINT8, OnnxFile, read_onnx
from ..arithmetic import FLOAT32, PROVEN, arithmetic_named
from ..protocol import Array, Closing, Feeds
from .arithmetic import ARITHMETICS
from .external_data import data_files
from .free_batch import BATCH
from .optimum_outputs import SECOND_NAME

_DTYPES: Final = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32"}
# ONNX Runtime widens float16 and integer weights when it loads a graph: as fast as float32, but both copies are in
# memory then.
WIDEN_AT_MOST: Final = 2**30  # bytes of float32
_ERRORS_ONLY: Final = 3  # ort's severities: 0 verbose ... 4 fatal


class OrtSession(Closing):
    """A loaded `.onnx` or `.ort` file.

    Args:
        timings: beginning of the path of a file in which ONNX Runtime writes down what each kernel takes.
    Raises:
        BundleError: the file is damaged, or takes other inputs than `model` says.
    """

    def __init__(self, model: TargetModel, threads: int, timings: str = "", arithmetic: str = PROVEN) -> None:
        import onnxruntime

        file = model.folder / model.files[0]
        self.inputs = model.inputs
        self.outputs = model.outputs
        self._name = f"ort {model.component}"
        try:
            self._session: Any = _open(file, threads, timings, arithmetic)
        except ort_errors() as error:
            raise BundleError(
                f"{file}: ONNX Runtime {onnxruntime.__version__} cannot load it: {first_line(error)}",
                hint="run `diffusette verify` on the bundle; if it is whole, convert again and report this",
            ) from None
        for kind, promised, found in (
            ("inputs", model.inputs, self._session.get_inputs()),
            ("outputs", model.outputs, self._session.get_outputs()),
        ):
            real = tuple(_spec(argument) for argument in found if argument.name != SECOND_NAME)
            # they are fed and read by name: the order is optimum's
            if sorted(real, key=_name) != sorted(promised, key=_name):
                raise BundleError(f"{file}: its {kind} are {_list(real)}, the manifest says {_list(promised)}")

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run once; feeds and results as `inputs` and `outputs` say.

        Raises:
            FeedError: a feed has another name, dtype or shape.
            ToolCrashed: ONNX Runtime failed inside the model.
        """
        from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

        if self._session is None:
            raise ToolCrashed(f"{self._name}: the session is closed")
        names = [spec.name for spec in self.outputs]
        try:
            return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        except (InvalidArgument, ValueError) as error:  # ValueError: a feed is missing
            raise FeedError(f"{self._name}: {first_line(error)}") from None
        except ort_errors() as error:
            raise ToolCrashed(f"{self._name}: {first_line(error)}") from None

    def end_profiling(self) -> Path:
        """Finish the file of `timings`, and say where it lies."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        self._session = None


def _open(file: Path, threads: int, timings: str, arithmetic: str) -> Any:
    """Load `file` with the options that cost the least memory for their time.

    Measured at the shapes of the SD 1.5 UNet (512x512, 2 threads), peak RSS and CPU seconds a run:
    ONNX Runtime's arena and memory pattern 5272 MiB, 10.5 s; without them 4328 MiB, 11.8 s.
    float16 weights widened at load 5790 MiB, 11.0 s; widened as they are used 2984 MiB, 13.0 s.
    """
    import onnxruntime

    options = session_options(threads)
    for option, value in arithmetic_named(arithmetic or FLOAT32, ARITHMETICS, "ort").options.items():
        options.add_session_config_entry(option, value)
    if timings:
        options.enable_profiling = True
        options.profile_file_prefix = timings
    disabled = []
    if file.suffix != ".ort" and _too_large_to_widen(_checked(file)):
        # both: the level above "extended" folds constants once more, whatever is disabled
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        disabled = ["ConstantFolding"]
    return onnxruntime.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    )


def session_options(threads: int) -> Any:
    """ONNX Runtime's options, without an arena: see `_open`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # int8 weights where the processor adds pairs of products in 16 bits: as uint8, which does not saturate
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_free_dimension_override_by_name(BATCH, 1)
    return options


def _checked(file: Path) -> OnnxFile:
    """What `file` says, and that its weights lie where `data_files` lets them."""
    model = read_onnx(file)
    data_files(model, file)
    return model


def _too_large_to_widen(model: OnnxFile) -> bool:
    """Whether float32 copies of a model's float16 and integer weights would take more than `WIDEN_AT_MOST`."""
    numbers = {FLOAT16: 1, INT8: 1, UINT8: 2}  # an element; bytes hold two nibbles
    stored = {tensor.name: tensor for tensor in model.initializers if tensor.data_type in numbers}
    narrow = [stored[name] for node in model.nodes if node.op == "Cast" for name in node.inputs if name in stored]
    return sum(4 * numbers[tensor.data_type] * prod(tensor.dims) for tensor in narrow) > WIDEN_AT_MOST


def _spec(argument: Any) -> TensorSpec:
    shape = tuple(dim if isinstance(dim, int) else -1 for dim in argument.shape)
    return TensorSpec(argument.name, _DTYPES.get(argument.type, argument.type), shape)


def _name(spec: TensorSpec) -> str:
    return spec.name


def _list(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in specs)


def ort_errors() -> tuple[type[Exception], ...]:
    """All exceptions of the native side; they have no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    found = [value for value in vars(native).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*found, RuntimeError)


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
