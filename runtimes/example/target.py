"""A template for new targets: the smallest honest one, tested like the others. Copy this folder and replace its inside.

The "runtime" is the ONNX specification's own reference implementation, in numpy: slow, exact, nothing for a phone, so
it is not in the registry's table. docs/adding-a-target.md walks through this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from ...quantize.onnx_model import TOOLS, onnx_model
from ...quantize.plan import Plan
from ...stages.artifacts import ComponentSource, OnnxModel, TargetModel
from ...stages.disk import copy_file
from ...stages.errors import BundleError, ToolCrashed, UnsupportedPrecision
from ...stages.extras import require_converter, require_modules
from ...stages.stage import Runner, Stage
from ..arithmetic import FLOAT32, PROVEN, Arithmetic
from ..checks import refuse_schemes
from ..protocol import Array, Closing, Feeds, Session, Target

# fp16 weights are cast to float32 in the graph: 16 bits a weight, but for biases and norms.
_BITS = {"fp32": 32.0, "fp16": 16.0}


class ExampleTarget(Target):
    """Satisfies `Target`."""

    name = "example"
    precisions = ("fp32", "fp16")  # only what tests/runtimes/test_contract.py proves
    arithmetics = (Arithmetic(FLOAT32, {}, "float32", is_default=True),)
    tools = TOOLS
    min_runtime = "1.16"  # the first onnx whose ReferenceEvaluator reads IR version 10

    def require(self) -> None:
        # What running needs, by the extra that brings it; this runtime comes with the converter.
        require_modules(("onnx",), "target 'example'", "convert")

    def require_build(self) -> None:
        self.require()
        require_converter("building for 'example'")

    def version(self) -> str:
        return version_of("onnx")

    def build(self, source: ComponentSource, size: tuple[int, int], plan: Plan, run: Runner) -> TargetModel:
        # A runtime whose converter digests the canonical ONNX starts from it. One that needs another export
        # form starts from `source` with stages of its own.
        refuse_schemes(self, source.component, plan)
        return run(BuildExample(onnx_model(source, size, plan, run)))

    def probe_model(self, model: TargetModel, w: Array, into: Path) -> TargetModel:
        raise UnsupportedPrecision("target 'example' has one arithmetic, float32: nothing needs to be probed")

    def open(self, model: TargetModel, *, threads: int, arithmetic: str = PROVEN) -> Session:
        return ExampleSession(model)  # numpy decides on its threads by itself


@dataclass(frozen=True)
class BuildExample(Stage[TargetModel], name="build-example", version=1, tools=()):
    """Canonical ONNX -> the form this runtime loads. A stage: cached by `key`, run in a child process."""

    onnx: OnnxModel

    def run(self, into: Path) -> TargetModel:
        # A real target converts here. Whatever it calls: read the status, check the files, never trust silence.
        names = sorted(file.name for file in self.onnx.folder.glob("model.onnx*"))  # the graph before its data
        for name in names:
            copy_file(self.onnx.folder / name, into / name)
        return TargetModel(
            folder=into,
            component=self.onnx.component,
            target="example",
            precision=self.onnx.precision,
            files=tuple(names),
            inputs=self.onnx.inputs,
            outputs=self.onnx.outputs,
            bits_per_weight=_BITS[self.onnx.precision],
        )


class ExampleSession(Closing):
    """Satisfies `Session`. What it is fed was checked by `isolation.open_isolated` before."""

    def __init__(self, model: TargetModel) -> None:
        import onnx
        from google.protobuf.message import DecodeError
        from onnx.reference import ReferenceEvaluator

        self.inputs = model.inputs
        self.outputs = model.outputs
        file = model.folder / model.files[0]
        try:
            # A bundle may be damaged or hostile: what the loader says about it becomes our error.
            self._evaluator: Any = ReferenceEvaluator(onnx.load(str(file)))
        except (DecodeError, onnx.checker.ValidationError, ValueError, OSError) as error:
            raise BundleError(f"{file}: cannot be loaded: {error}", hint="run `diffusette verify` on it") from None
        if (found := list(self._evaluator.input_names)) != (promised := [spec.name for spec in model.inputs]):
            raise BundleError(f"{file}: its inputs are {found}, the manifest says {promised}")

    def run(self, feeds: Feeds) -> dict[str, Array]:
        if self._evaluator is None:
            raise ToolCrashed("example: the session is closed")
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._evaluator.run(names, dict(feeds)), strict=True))

    def close(self) -> None:
        self._evaluator = None  # a native runtime frees its memory here
