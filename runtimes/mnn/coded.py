"""ONNX -> MNN with weights of few bits: MNN's converter makes the structure, the weights are our own codes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

from ...quantize.codes_file import QuantizedWeights
from ...quantize.plan import Plan
from ...quantize.stored_weights import ApartWeights
from ...stages.artifacts import ComponentSource, OnnxModel, TargetModel
from ...stages.stage import Stage
from .convert import checked_model
from .graph import write_mnn_graph
from .mnn_file import MnnFile
from .native import mnnconvert
from .weight_file import owners_of, store_weights

# A scale a channel, symmetric, in a file of their own: the form that `store_weights` rewrites.
_FLAGS: Final = ("--weightQuantBits", "8", "--weightQuantAsymmetric", "0", "--saveExternalData")


@dataclass(frozen=True)
class BuildCodedMnn(Stage[TargetModel], name="mnn", version=3, tools=("MNN", "onnx-ir", "flatbuffers")):
    """Canonical ONNX of dequantised weights -> `<component>.mnn`, and `<component>.mnn.weight` with a plan's codes.

    The converter quantises too, and its codes are thrown away once they have shown that names were matched rightly.
    """

    onnx: OnnxModel
    source: ComponentSource
    plan: Plan
    quantized: QuantizedWeights
    notes: tuple[str, ...] = ()

    def run(self, into: Path) -> TargetModel:
        import onnx_ir as ir

        stored = ApartWeights(self.source, self.plan, self.quantized)
        file, scratch = into / f"{self.onnx.component}.mnn", into / "scratch"
        scratch.mkdir()
        graph = write_mnn_graph(self.onnx, scratch, stored)
        owners = owners_of(ir.load(graph.file).graph, frozenset(stored.names()))
        flags = ("-f", "ONNX", "--modelFile", str(graph.file), "--MNNModel", str(file), "--bizCode", "diffusette")
        mnnconvert([*flags, *_FLAGS], scratch)
        shutil.rmtree(scratch)
        MnnFile(file).check_weights()
        store_weights(MnnFile(file), stored, owners)
        MnnFile(file).check_weights()
        MnnFile(file).stamp()
        built, numbers = MnnFile(file), sum(prod(shape) for shape in stored.shapes().values())
        bits = round(8 * built.weight_bytes / numbers, 3)
        notes, outputs = (setting_note(self.plan), *self.notes, *graph.notes), self.onnx.outputs
        return checked_model(built, self.onnx.component, self.onnx.precision, graph.inputs, outputs, bits, notes)


def setting_note(plan: Plan) -> str:
    """What an app must set, for a runtime that takes any setting and says nothing."""
    if any(scheme.activation_bits == 8 for scheme in plan.schemes):
        return "made for and compared with MNN's `memory` at 2 (low): activations are rounded to 8 bits as it runs"
    caution = "made for and compared with MNN's `memory` at 0 (normal)"
    if not plan.channels and any(scheme.group for scheme in plan.schemes):
        return f"{caution}; at 2 (low) MNN takes its groups of weights for others, and the picture is lost"
    return f"{caution}; at 2 (low) MNN rounds activations as well: a picture not compared with PyTorch's"
