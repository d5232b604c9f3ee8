"""What MNN's converter makes of a network, learned from two narrow copies of it.

The converter holds every weight twice: 7.4 GB for the UNet of Stable Diffusion 1.5. So it converts the same graph at
two small widths, with weights that can be recognised, and each number of the result is carried on to the real width.
docs/decisions/0012.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final

from ...export.graph import ExportGraph, Graph
from ...export.simplify import SimplifyGraph
from ...quantize.onnx_model import branched, onnx_graph
from ...quantize.plan import Plan
from ...stages.artifacts import ComponentSource, TensorSpec, role_of
from ...stages.errors import ModelError, NoRoom, ToolCrashed
from ...stages.failures import FULL_DISK
from ...stages.stage import Runner, Stage
from ..narrowing import NotAlikeError, Width, narrow_copy
from .convert import EXTERNAL_ABOVE
from .copies import Copies, Copy
from .flat import UnknownFormError, Values, pack, read
from .native import mnnconvert
from .widen import Converted, Operation, widened

_FLAGS: Final = {
    "fp32": (),
    "fp16": ("--fp16",),
    "codes": ("--weightQuantBits", "8", "--weightQuantAsymmetric", "0"),
}
# Widths of copies over that of the exported one. The first two that keep constants apart are taken: 3, for one, makes
# 768 of the 64 channels of a feed-forward layer, which is what a text encoder gives as well.
_TIMES: Final = tuple(Fraction(quarters, 4) for quarters in (4, 5, 6, 7, 8, 10, 12, 14, 16))


@dataclass(frozen=True, slots=True)
class LearnedMnn:
    """A `.mnn` without the weights (`model.json`): its tables, and which parameter goes where."""

    folder: Path
    component: str
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    note: str = ""  # why nothing was learned
    digest: str = ""

    def model(self) -> tuple[Values, list[Operation], dict[str, tuple[int, ...]]]:
        """What `widen.widened` gives, and the shapes of the parameters."""
        net, operations, shapes = json.loads((self.folder / "model.json").read_text())
        return net, operations, {name: tuple(shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class LearnMnn(Stage[LearnedMnn], name="mnn-form", version=4, tools=("MNN", "onnx", "onnx-ir", "flatbuffers")):
    """Convert two narrow copies of `graph`; `narrow` is the same architecture, exported narrower."""

    graph: Graph
    narrow: Graph
    width: int  # of `graph`, in units of its width
    narrow_width: int
    whole: bool  # see `NarrowCopy`
    aliases: Mapping[int, int]
    form: str  # a key of _FLAGS

    def run(self, into: Path) -> LearnedMnn:
        scratch = into / "scratch"
        scratch.mkdir()
        try:
            copies = Copies(self.graph, self.width, self.narrow, self.narrow_width, self.aliases, scratch)
            model = self._learn(copies)
        except (NotAlikeError, UnknownFormError) as reason:
            if shutil.disk_usage(into).free < FULL_DISK:  # what broke off is like nothing, this time
                raise NoRoom(f"the disk is full: {reason}") from None
            return LearnedMnn(into, self.graph.component, note=str(reason))
        finally:
            shutil.rmtree(scratch)
        (into / "model.json").write_text(json.dumps([*model, copies.shapes]))
        return LearnedMnn(into, self.graph.component, copies.specs, self.graph.outputs)

    def _learn(self, copies: Copies) -> tuple[Values, list[Operation]]:
        widths, pair = self._pair(copies)
        forms = ("fp32",) if self.form == "fp32" else ("fp32", self.form)
        made = {form: [_convert(copy, form) for copy in pair] for form in forms}
        return widened(made["fp32"], made[self.form], widths, self.width, copies)

    def _pair(self, copies: Copies) -> tuple[tuple[Width, Width], tuple[Copy, Copy]]:
        """Two copies that keep apart what the real graph keeps apart, and their widths."""
        found: dict[Width, Copy] = {}
        reason = NotAlikeError("no copy")
        for width in (times * self.narrow_width for times in _TIMES):
            if width >= self.width or (self.whole and width.denominator != 1):
                continue
            try:
                found[width] = copies.at(width)
            except NotAlikeError as error:
                reason = error
            if len(found) == 2:
                (one, first), (two, second) = found.items()
                return (one, two), (first, second)
        raise reason


def _convert(copy: Copy, form: str) -> Converted:
    folder = copy.file.parent / form
    folder.mkdir()
    file = folder / "model.mnn"
    flags = ("-f", "ONNX", "--modelFile", str(copy.file), "--MNNModel", str(file), "--bizCode", "diffusette")
    mnnconvert([*flags, "--saveExternalData", *_FLAGS[form]], folder)
    data = file.read_bytes()
    net = read(data)
    if pack(net) != data:
        raise UnknownFormError("mnnconvert's file is not written as it is understood here")
    return Converted(copy, net, file.with_name(f"{file.name}.weight"))


def learned(source: ComponentSource, size: tuple[int, int], plan: Plan, run: Runner) -> tuple[LearnedMnn | None, str]:
    """What MNN's converter makes of a component, or None and why: "" where the network is small enough for it.

    A converter that crashed on a narrow copy is not remembered: stages are cached, and it may have died of memory that
    others had taken at that moment. The next conversion tries the copies again.
    """
    if source.parameters * (2 if plan.label == "fp16" else 4) <= EXTERNAL_ABOVE:
        return None, ""
    form = plan.label if plan.is_float else "codes"
    copy = narrow_copy(source.component, source.config)
    if copy is None:
        return None, "its channels have no common unit that is far smaller"
    if form == "codes" and role_of(source.component) == "text":
        return None, "token embeddings that become codes are not learned"
    graph = branched(onnx_graph(source, size, run), source, plan, run)
    try:
        narrow = run(SimplifyGraph(run(ExportGraph(source.component, source.family, copy.config, size))))
        narrow = branched(narrow, source, plan, run)
    except ModelError as error:
        return None, f"a narrow copy could not be exported: {error}"
    try:
        made = run(LearnMnn(graph, narrow, copy.real, copy.width, copy.whole, copy.aliases, form))
    except ToolCrashed as crash:
        return None, f"a narrow copy could not be converted: {crash.what.splitlines()[0]}"
    return (None, made.note) if made.note else (made, "")
