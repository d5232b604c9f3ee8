"""ONNX Runtime as a target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version as version_of
from pathlib import Path
from typing import ClassVar

from ...quantize.onnx_model import TOOLS, onnx_graph, onnx_model
from ...quantize.plan import Plan
from ...quantize.quantized import quantized_weights
from ...stages.artifacts import Checkpoint, ComponentSource, TargetModel
from ...stages.errors import refuse_unknown
from ...stages.extras import require_converter, require_modules
from ...stages.stage import Runner
from ..arithmetic import FLOAT32, PROVEN, Arithmetic
from ..checks import refuse_schemes
from ..op_times import OpTimes
from ..protocol import Array, Feeds, Session, Target
from ..taps import Wiring
from .arithmetic import ARITHMETICS, FAST_BFLOAT16, FLOAT16, computes_half
from .build import FORMS, BuildOrt
from .build_coded import BuildCoded
from .halves import halved_modules
from .optimum_layout import layout_files
from .session import OrtSession
from .taps import OrtTaps, read_wiring


class OrtTarget(Target):
    """ONNX Runtime on the CPU, desktop or phone.

    At fp16, float16 is a way to store weights: arithmetic stays float32, and the runtime widens the weights when it
    loads them (`.onnx`) or as it goes (`.ort`). At fp16_a16 the graph itself asks for float16: see `halves`.
    """

    name = "ort"
    precisions: ClassVar[tuple[str, ...]] = (
        "fp32", "fp16", "w8c_afp", "w4g64_afp", "w4g32_afp", "w4g128_afp", "w4c_afp", "w8c_a8", "fp16_a16",
    )  # fmt: skip
    activations = ("dynamic", "static")
    low_rank = True
    arithmetics = ARITHMETICS
    tools = (*TOOLS, "onnxruntime")
    min_runtime = "1.18"  # the first that reads ONNX IR version 10; 1.18.1 was run on both forms

    def __init__(self, forms: Sequence[str] = FORMS) -> None:
        refuse_unknown(forms, FORMS, "[target.ort] forms")
        self._forms = tuple(forms)

    def require(self) -> None:
        require_modules(("onnxruntime",), "target 'ort'", "ort")

    def require_build(self) -> None:
        self.require()
        require_converter("building for 'ort'")

    def version(self) -> str:
        return version_of("onnxruntime")

    def build(self, source: ComponentSource, size: tuple[int, int], plan: Plan, run: Runner) -> TargetModel:
        refuse_schemes(self, source.component, plan)
        if not plan.is_float:
            codes = quantized_weights(source, plan, run)
            return run(BuildCoded(onnx_graph(source, size, run), source, plan, codes, self._forms))
        modules = halved_modules(source, plan)
        return run(BuildOrt(onnx_model(source, size, plan, run), self._forms, modules))

    def choices(self, models: Iterable[TargetModel]) -> tuple[Arithmetic, ...]:
        wanted = {self.proven_in(model) for model in models}
        return tuple(each for each in ARITHMETICS if each.name in wanted or FAST_BFLOAT16 in each.options)

    def probe_model(self, model: TargetModel, w: Array, into: Path) -> TargetModel:
        from .arithmetic_probe import probe_model

        return probe_model(w, into, half=computes_half(model))

    def proven_in(self, model: TargetModel) -> str:
        return FLOAT16 if computes_half(model) else FLOAT32

    def open(self, model: TargetModel, *, threads: int, arithmetic: str = PROVEN) -> Session:
        return OrtSession(model, threads, arithmetic=arithmetic)

    def wiring(self, model: TargetModel, source: ComponentSource, size: tuple[int, int], run: Runner) -> Wiring:
        return read_wiring(model)

    def time_ops(self, model: TargetModel, feeds: Feeds, *, threads: int, runs: int) -> OpTimes:
        from .op_times import time_ops

        return time_ops(model, feeds, threads=threads, runs=runs)

    def open_taps(self, model: TargetModel, *, threads: int) -> OrtTaps:
        return OrtTaps(model, threads)

    def assets(self, checkpoint: Checkpoint, size: tuple[int, int]) -> dict[str, bytes]:
        """Files for the bundle (path -> content) with which optimum opens it: see `optimum_layout`."""
        return layout_files(checkpoint, size)
