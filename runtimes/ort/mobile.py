"""The `.ort` form: one flatbuffer with graph and weights, for ONNX Runtime's small mobile builds."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ...stages.disk import mebibytes
from ...stages.errors import ModelError
from .loose_weights import put_weights_back, take_weights_out
from .ort_file import put_in_order
from .session import first_line, ort_errors

ORT_FILE: Final = "model.ort"
OPERATORS_FILE: Final = "required_operators.config"
# A flatbuffer's offsets are signed 32-bit (flatbuffers "FLATBUFFERS_MAX_BUFFER_SIZE"): ONNX Runtime fails to save more.
MAX_BYTES: Final = 2**31 - 1
# Folding Cast(float16 weight) into a float32 weight would double the file.
_DISABLED: Final = ["ConstantFolding"]


def why_absent(weight_bytes: int, graph_bytes: int) -> str:
    """Why a model of that size has no `.ort` form, or "" when it has one."""
    size = weight_bytes + graph_bytes
    if size <= MAX_BYTES:
        return ""
    return (
        f"no .ort form: the format holds {mebibytes(MAX_BYTES)}, this model is {mebibytes(size)}; "
        "use its .onnx form, or fewer bits"
    )


def write_ort(onnx_file: Path, folder: Path, weight_bytes: int) -> tuple[str, ...]:
    """Write `model.ort` and `required_operators.config` of `onnx_file` into `folder`; return their names.

    Graph optimisations stop at "extended": what lies beyond is made for the processor of this machine, and the
    file is for another one. Precision of the weights is kept: the file's size is checked.

    Raises:
        ModelError: ONNX Runtime cannot save the model, or its file has not the size of its weights.
    """
    import onnx
    import onnxruntime

    from .external_data import read_graph

    target, unordered = folder / ORT_FILE, folder / "unordered.ort"
    model = read_graph(onnx_file)
    weights = take_weights_out(model)
    if weights:
        hollow = folder / "hollow.onnx"
        onnx.save(model, str(hollow))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(unordered)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.disable_prepacking", "1")  # weights packed for this machine: of no use
    options.enable_cpu_mem_arena = False
    try:
        onnxruntime.InferenceSession(
            str(hollow if weights else onnx_file),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=_DISABLED,
        )
    except ort_errors() as error:
        raise ModelError(f"{onnx_file}: ONNX Runtime cannot save it as {ORT_FILE}: {first_line(error)}") from None
    put_in_order(unordered, target)
    unordered.unlink()
    _write_operators(target, folder / OPERATORS_FILE)  # onnxruntime's tool reads all of the file
    twice = 0
    if weights:
        hollow.unlink()
        twice = put_weights_back(target, weights, onnx_file.parent)
    size = target.stat().st_size - twice
    # Beside the weights stand nodes and names, seen to take twice the bytes that they take in the .onnx file.
    if not 0 <= size - weight_bytes <= 4 * onnx_file.stat().st_size:
        raise ModelError(
            f"{ORT_FILE} of {onnx_file}: {size} bytes for {weight_bytes} bytes of weights: their precision changed",
            hint="report this as a bug",
        )
    return (ORT_FILE, OPERATORS_FILE)


def _write_operators(model: Path, file: Path) -> None:
    """List the operators of `model` for ONNX Runtime's build option `--include_ops_by_config`."""
    from onnxruntime.tools.ort_format_model import create_config_from_models

    create_config_from_models([model], file, enable_type_reduction=False)
    kept = [line for line in file.read_text().splitlines() if not line.startswith("#")]  # the header names our folder
    if not kept:
        raise ModelError(f"{file}: no operator was found in {model}", hint="report this as a bug")
    file.write_text("\n".join([f"# operators of {model.name}", *kept]) + "\n")
