"""Graph + weights -> a complete ONNX model, one tensor in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..checkpoints.weights import Weights
from ..export.graph import ExportGraph, Graph, WeightSlot
from ..export.simplify import SimplifyGraph
from ..stages.artifacts import ComponentSource, OnnxModel
from ..stages.stage import Runner, Stage
from .branches import BranchGraph
from .codes_file import QuantizedWeights
from .low_rank import UP
from .plan import Plan
from .quantized import quantized_weights

TOOLS: Final = ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir", "onnxsim", "onnx")
"""Distributions that have a part in the canonical ONNX."""

DATA_FILE: Final = "model.onnx_data"  # optimum's name for external data
_ALIGNMENT: Final = 4096  # lets ONNX Runtime map tensors instead of reading them
_INLINE_BELOW: Final = 1024  # bytes; smaller tensors stay in the protobuf, as onnx itself does by default


@dataclass(frozen=True)
class WriteOnnx(Stage[OnnxModel], name="weights", version=2, tools=("onnx", "numpy")):
    """Stream a component's weights into its graph.

    Where the plan stores float16, weights that had two or more dimensions in PyTorch are float16 in the file and cast
    back to float32 in the graph: half the file, float32 arithmetic. Vectors (biases, norms) stay float32: they are
    0.1% of the bytes. Sources: IEEE 754 round-to-nearest-even, by numpy.
    """

    graph: Graph
    source: ComponentSource
    plan: Plan
    quantized: QuantizedWeights | None = None  # codes of a plan that has any: their values are written as float32

    def run(self, into: Path) -> OnnxModel:
        import onnx

        from .stored_weights import ApartWeights, StoredWeights

        model = onnx.load(str(self.graph.file))
        slots = self.graph.slots()
        apart = any(slot.source.endswith(UP) for slot in slots)
        weights = (ApartWeights if apart else StoredWeights)(self.source, self.plan, self.quantized)
        weights.check({slot.source: slot.stored for slot in slots})
        names = {slot.name for slot in slots}
        kept = [value for value in model.graph.input if value.name not in names]
        del model.graph.input[:]
        model.graph.input.extend(kept)
        casts = []
        with (into / DATA_FILE).open("wb") as data:
            for slot in slots:
                tensor, cast = self._tensor(slot, weights, data)
                model.graph.initializer.append(tensor)
                casts += cast
        for number, node in enumerate(casts):
            model.graph.node.insert(number, node)
        onnx.save(model, str(into / "model.onnx"))
        onnx.checker.check_model(str(into / "model.onnx"))
        return OnnxModel(into, self.graph.component, self.plan.label, self.graph.inputs, self.graph.outputs)

    def _tensor(self, slot: WeightSlot, weights: Any, data: Any) -> tuple[Any, list[Any]]:
        import numpy as np
        from onnx import TensorProto, helper

        array = weights.read(slot.source)
        half = weights.scheme(slot.source).is_half
        if slot.permute:
            array = array.transpose(slot.permute)
        array = np.ascontiguousarray(array).reshape(slot.shape)
        if half:
            array = array.astype(np.float16)  # exact: they are rounded already
        tensor = TensorProto(name=slot.name, dims=slot.shape)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        if array.nbytes < _INLINE_BELOW:
            tensor.raw_data = array.tobytes()
        else:
            data.write(bytes(-data.tell() % _ALIGNMENT))
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": DATA_FILE, "offset": data.tell(), "length": array.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            data.write(array)
        if not half:
            return tensor, []
        tensor.name = f"{slot.name}.fp16"
        node = helper.make_node("Cast", [tensor.name], [slot.name], name=f"{slot.name}.cast", to=TensorProto.FLOAT)
        node.metadata_props.add(key="module", value=slot.source.rpartition(".")[0])
        return tensor, [node]


def branched_model(source: ComponentSource, size: tuple[int, int], plan: Plan, run: Runner) -> OnnxModel:
    """As `onnx_model`, with low-rank branches as layers of their own beside those that hold the codes' values."""
    graph = branched(onnx_graph(source, size, run), source, plan, run)
    return run(WriteOnnx(graph, source, plan, quantized_weights(source, plan, run)))


def branched(graph: Graph, source: ComponentSource, plan: Plan, run: Runner) -> Graph:
    """`graph`, of the architecture of `source` at any width, with a branch beside each layer that `plan` gives one."""
    weights = Weights(source)
    ranks = {name: plan.scheme(name, weights.spec(name)[1]).rank for name in weights.names()}
    found = tuple(sorted((name, rank) for name, rank in ranks.items() if rank))
    return run(BranchGraph(graph, found)) if found else graph


def onnx_model(source: ComponentSource, size: tuple[int, int], plan: Plan, run: Runner) -> OnnxModel:
    """The canonical ONNX of a component: exported, simplified, with its weights rounded as `plan` says.

    Weights that the plan stores as codes are in it as the float32 values of these codes.
    """
    graph = onnx_graph(source, size, run)
    return run(WriteOnnx(graph, source, plan, quantized_weights(source, plan, run)))


def onnx_graph(source: ComponentSource, size: tuple[int, int], run: Runner) -> Graph:
    """The structure of a component: exported and simplified, without weights."""
    return run(SimplifyGraph(run(ExportGraph(source.component, source.family, source.config, size))))
