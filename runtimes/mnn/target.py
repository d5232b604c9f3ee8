"""MNN (https://github.com/alibaba/MNN), run on the CPU."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...quantize.onnx_model import TOOLS
from ...quantize.plan import Plan
from ...stages.artifacts import ComponentSource, TargetModel
from ...stages.extras import require_converter, require_modules
from ..arithmetic import PROVEN
from ..checks import refuse_schemes
from ..op_times import OpTimes
from ..protocol import Array, Feeds, Session, Target
from ..taps import Wiring
from .arithmetic import ARITHMETICS, GROUP_CHANNELS, proven_in

if TYPE_CHECKING:
    from ...stages.stage import Runner
    from .taps import MnnTaps


class MnnTarget(Target):
    """Satisfies `Target`."""

    name = "mnn"
    precisions: ClassVar[tuple[str, ...]] = (
        "fp32", "fp16", "w8c_afp", "w8c_a8", "w4c_afp", "w4g32_afp", "w4g64_afp", "w4g128_afp",
    )  # fmt: skip
    activations = ("dynamic",)
    mixes_floats = False
    mixes_activations = False
    low_rank = True
    group_channels = GROUP_CHANNELS
    arithmetics = ARITHMETICS
    tools = (*TOOLS, "MNN")
    min_runtime = "3.6.1"

    def require(self) -> None:
        require_modules(("MNN", "_mnncengine", "flatbuffers"), "target 'mnn'", "mnn")

    def require_build(self) -> None:
        self.require()
        require_modules(("_tools",), "building for 'mnn'", "convert")  # MNN's converter, in the same wheel
        require_converter("building for 'mnn'")

    def version(self) -> str:
        return version("MNN")

    def build(self, source: ComponentSource, size: tuple[int, int], plan: Plan, run: Runner) -> TargetModel:
        from ...quantize.onnx_model import branched_model, onnx_model
        from ...quantize.quantized import quantized_weights
        from .coded import BuildCodedMnn
        from .convert import BuildMnn
        from .narrow import learned
        from .write import WriteMnn

        refuse_schemes(self, source.component, plan)
        quantized = quantized_weights(source, plan, run)
        form, reason = learned(source, size, plan, run)
        if form is not None:
            return run(WriteMnn(form, source, plan, quantized))
        notes = (f"MNN's converter got the whole network: {reason}",) if reason else ()
        if quantized is None:
            return run(BuildMnn(onnx_model(source, size, plan, run), notes))
        return run(BuildCodedMnn(branched_model(source, size, plan, run), source, plan, quantized, notes))

    def proven_in(self, model: TargetModel) -> str:
        return proven_in(model)

    def probe_model(self, model: TargetModel, w: Array, into: Path) -> TargetModel:
        from .arithmetic_probe import probe_model

        return probe_model(w, into)

    def unfit(self, model: TargetModel) -> dict[str, str]:
        from .memory_low import unsupported

        return unsupported(model)

    def open(self, model: TargetModel, *, threads: int, arithmetic: str = PROVEN) -> Session:
        from .session import MnnSession

        self.require()
        return MnnSession(model, threads, arithmetic)

    def wiring(self, model: TargetModel, source: ComponentSource, size: tuple[int, int], run: Runner) -> Wiring:
        from ...quantize.onnx_model import onnx_graph
        from .taps import read_wiring

        return read_wiring(model, onnx_graph(source, size, run))

    def time_ops(self, model: TargetModel, feeds: Feeds, *, threads: int, runs: int) -> OpTimes:
        from .op_times import time_ops

        self.require()
        return time_ops(model, feeds, threads=threads, runs=runs)

    def open_taps(self, model: TargetModel, *, threads: int) -> MnnTaps:
        from .taps import MnnTaps

        self.require()
        return MnnTaps(model, threads)
