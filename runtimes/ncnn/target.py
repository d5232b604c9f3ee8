"""The ncnn target: TorchScript -> pnnx -> `.param` + `.bin`."""

from __future__ import annotations

from importlib.metadata import version as version_of
from pathlib import Path
from typing import ClassVar

from ...quantize.plan import Plan
from ...quantize.quantized import quantized_weights
from ...stages.artifacts import ComponentSource, TargetModel
from ...stages.errors import MissingTool
from ...stages.extras import require_converter, require_modules
from ...stages.stage import Runner
from ..arithmetic import PROVEN
from ..checks import refuse_schemes
from ..op_times import OpTimes
from ..protocol import Array, Feeds, Target
from ..taps import Wiring
from . import pnnx
from .arithmetic import ARITHMETICS
from .arithmetic_probe import probe_model
from .session import NcnnSession
from .taps import NcnnTaps, read_wiring
from .trace import trace_of
from .write import WriteNcnn


class NcnnTarget(Target):
    """ncnn on the CPU. `.param` and `.bin` are what an app loads; inputs and outputs bear our names."""

    name = "ncnn"
    precisions: ClassVar[tuple[str, ...]] = (
        "fp32", "fp16", "w8c_afp", "w4c_afp", "w4g32_afp", "w4g64_afp", "w4g128_afp", "w8c_a8",
    )  # fmt: skip
    activations = ("static",)  # of convolutions; linear layers round rows as they come
    low_rank = True
    arithmetics = ARITHMETICS
    tools = ("torch", "diffusers", "transformers", "pnnx", "ncnn")
    min_runtime = "1.0.20261020"

    def require(self) -> None:
        require_modules(("ncnn",), "target 'ncnn'", "ncnn")

    def require_build(self) -> None:
        self.require()
        pnnx.program()
        require_converter("building for 'ncnn'")
        runtime, converter = version_of("ncnn").rpartition(".")[2], version_of("pnnx").rpartition(".")[2]
        if converter > runtime:  # both are dates
            raise MissingTool(
                f"pnnx {converter} writes layers that ncnn {runtime} may not know",
                hint=f"pip install ncnn==1.0.{converter}",
            )

    def version(self) -> str:
        return version_of("ncnn")

    def build(self, source: ComponentSource, size: tuple[int, int], plan: Plan, run: Runner) -> TargetModel:
        refuse_schemes(self, source.component, plan)
        return run(WriteNcnn(run(trace_of(source, size)), source, size, plan, quantized_weights(source, plan, run)))

    def probe_model(self, model: TargetModel, w: Array, into: Path) -> TargetModel:
        return probe_model(w, into)

    def open(self, model: TargetModel, *, threads: int, arithmetic: str = PROVEN) -> NcnnSession:
        return NcnnSession(model, threads, arithmetic)

    def wiring(self, model: TargetModel, source: ComponentSource, size: tuple[int, int], run: Runner) -> Wiring:
        return read_wiring(model, run(trace_of(source, size)))

    def time_ops(self, model: TargetModel, feeds: Feeds, *, threads: int, runs: int) -> OpTimes:
        from .op_times import time_ops

        return time_ops(model, feeds, threads=threads, runs=runs)

    def open_taps(self, model: TargetModel, *, threads: int) -> NcnnTaps:
        return NcnnTaps(model, threads)
