"""The canonical ONNX, changed to what an MNN model on a phone should take and MNN's converter keep exact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ...quantize.stored_weights import StoredWeights
from ...stages.artifacts import OnnxModel, TensorSpec
from ...stages.errors import ModelError
from ..inputs import TIME_IDS_EMBEDDING, TIMESTEP_EMBEDDING
from ..steady_norms import steady_norms
from .embeddings import code_embeddings

if TYPE_CHECKING:
    import onnx_ir as ir

# UNet2DConditionModel, diffusers
_TIME_PROJECTION: Final = "time_embedding.linear_1.weight"
_ADDED_PROJECTION: Final = "add_embedding.linear_1.weight"
_DATA_FILE: Final = "model.onnx_data"  # where `OnnxModel` keeps large weights
_WIDE_FILE: Final = "wide.onnx_data"

# Values a group above which a norm is added up in two steps. MNN's own chain leaves 95 dB of the VAE decoder at 2^20
# (512 x 512), which its tolerance allows for, and 78 at 2^22; two steps square in the graph, which takes float32.
_LONGEST_CHAIN: Final = 2**20
STEADY_NOTE: Final = (
    "normalisations of the largest feature maps are computed in steps that float16 cannot hold: run it with MNN's "
    "`precision` at 1 (high)"
)

_MOVES: Final = {"Concat", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}  # no arithmetic


@dataclass(frozen=True)
class MnnGraph:
    """An ONNX file for MNN's converter."""

    file: Path
    inputs: tuple[TensorSpec, ...]
    # Only at precision "fp16":
    vectors: dict[str, NDArray[np.float32]]  # its float32 constants by name: biases, norms, scalars
    halves: frozenset[str]  # names of the values that are exact in float16: weights
    notes: tuple[str, ...] = ()


def write_mnn_graph(onnx: OnnxModel, folder: Path, stored: StoredWeights | None = None) -> MnnGraph:
    """Write `onnx` with MNN's inputs to `folder`, its float32 weights linked rather than copied.

    - `timestep` gives way to `timestep_embedding`, so that no phone computes sines of large angles in float16
      (in float32 MNN's sine is already off by 4e-5 at timestep 981), and SDXL's `time_ids` to `time_ids_embedding`.
    - `input_ids` becomes int32: MNN has no int64.
    - float16 weights become the same numbers in float32: MNN misreads float16 external data, without a word.
    - Token embeddings that `stored` has codes of become codes.
    - Norms of more than `_LONGEST_CHAIN` values are added up in two steps.
    - Metadata goes: MNN copies it into its model.
    """
    import onnx as library
    import onnx_ir as ir
    from onnx_ir.passes import common as passes

    proto = library.load(str(onnx.file), load_external_data=False)
    steadied = steady_norms(proto, _LONGEST_CHAIN + 1)
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, onnx.folder)
    graph, inputs = model.graph, onnx.inputs
    for value in tuple(graph.inputs):
        if value.name == "timestep":
            spec = _take_embedding(graph, value, TIMESTEP_EMBEDDING, _TIME_PROJECTION)
        elif value.name == "time_ids":
            spec = _take_embedding(graph, value, TIME_IDS_EMBEDDING, _ADDED_PROJECTION)
        elif value.dtype == ir.DataType.INT64:
            spec = _narrow(graph, value)
        else:
            continue
        inputs = tuple(spec if old.name == value.name else old for old in inputs)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _multiply_by_reciprocals(graph)
    passes.RemoveUnusedNodesPass()(model)
    model.metadata_props.clear()
    vectors, halves = {}, frozenset[str]()
    if stored is not None:
        code_embeddings(graph, stored)
        _widen(graph, folder)
        passes.RemoveUnusedNodesPass()(model)
    elif onnx.precision == "fp16":
        halves = _widen(graph, folder)
        vectors = _vectors(graph, halves)
        passes.RemoveUnusedNodesPass()(model)  # the float16 forms
    file = folder / onnx.file.name
    ir.save(model, file)
    data = onnx.folder / _DATA_FILE
    if data.exists():
        (folder / _DATA_FILE).symlink_to(data.resolve())
    return MnnGraph(file, inputs, vectors, halves, (STEADY_NOTE,) if steadied else ())


def _take_embedding(graph: ir.Graph, number: ir.Value, name: str, projection: str) -> TensorSpec:
    """Cut the graph where the sinusoid of `number` enters the first Linear of an embedding."""
    import onnx_ir as ir

    weights = [v for v in _all_values(graph) if v.name == projection]
    users = [use.node for weight in weights for use in weight.uses() if use.node.op_type in ("Gemm", "MatMul")]
    entering = users[0].inputs[0] if len(users) == 1 else None
    sinusoid = _part_from(entering, number)
    if sinusoid is None or not _is_row(sinusoid.shape):
        raise ModelError(
            f"{len(users)} nodes use {projection!r}, and one that takes [1, channels] was expected",
            hint="MNN models are built for UNets with diffusers' sinusoidal time embedding; please report this one",
        )
    assert sinusoid.shape is not None
    shape = (1, int(sinusoid.shape[1]))  # type: ignore[arg-type]  # _is_row says that it is an int
    embedding = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    sinusoid.replace_all_uses_with(embedding)
    graph.inputs[graph.inputs.index(number)] = embedding
    return TensorSpec(name, "float32", shape)


def _part_from(value: ir.Value | None, number: ir.Value) -> ir.Value | None:
    """What of `value` is made of the graph input `number` alone: an embedded guidance scale is added to the sinusoid
    of the timestep, and SDXL's pooled text stands beside that of the time ids."""
    while value is not None:
        node = value.producer()
        made_of = _graph_inputs(value)
        if made_of == {number}:
            return value
        if node is None or node.op_type not in ("Add", "Concat") or number not in made_of:
            return None
        value = next((part for part in node.inputs if part is not None and number in _graph_inputs(part)), None)
    return None


def _graph_inputs(value: ir.Value) -> set[ir.Value]:
    """The inputs of the graph that `value` is computed from."""
    found, seen, waiting = set(), set(), [value]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.is_graph_input():
            found.add(current)
        node = current.producer()
        waiting += [part for part in node.inputs if part is not None] if node is not None else []
    return found


def _is_row(shape: ir.Shape | None) -> bool:
    return shape is not None and len(shape) == 2 and shape[0] == 1 and isinstance(shape[1], int)


def _narrow(graph: ir.Graph, value: ir.Value) -> TensorSpec:
    """Make an int64 input int32, and cast it back for the nodes that expect int64."""
    import onnx_ir as ir

    cast = ir.node("Cast", [value], attributes={"to": ir.DataType.INT64}, name=f"{value.name}.int64")
    wide = cast.outputs[0]
    wide.name, wide.shape, wide.dtype = f"{value.name}.int64", value.shape, ir.DataType.INT64
    value.replace_all_uses_with(wide)
    cast.replace_input_with(0, value)
    graph.insert_before(graph[0], cast)
    value.dtype = ir.DataType.INT32
    return TensorSpec(value.name or "", "int32", tuple(wide.shape.numpy()) if wide.shape else ())


def _multiply_by_reciprocals(graph: ir.Graph) -> None:
    """x / constant -> x * (1 / constant), at most 1 ulp from it. MNN does so too, and gives the constant a new name."""
    import onnx_ir as ir

    for node in graph:
        divisor = node.inputs[1].const_value if node.op_type == "Div" and node.inputs[1] is not None else None
        if divisor is None or divisor.dtype != ir.DataType.FLOAT:
            continue
        name = f"{node.outputs[0].name}.reciprocal"
        reciprocal = (1.0 / divisor.numpy().astype(np.float64)).astype(np.float32)
        value = ir.Value(name=name, const_value=ir.tensor(reciprocal, name=name))
        value.shape, value.dtype = ir.Shape(reciprocal.shape), ir.DataType.FLOAT
        graph.register_initializer(value)
        product = ir.node("Mul", [node.inputs[0], value], name=node.name)
        new, old = product.outputs[0], node.outputs[0]
        new.name, new.shape, new.type = old.name, old.shape, old.type
        ir.convenience.replace_nodes_and_values(graph, node, [node], [product], [old], [new])


def _widen(graph: ir.Graph, folder: Path) -> frozenset[str]:
    """Replace float16 initializers and their Casts by float32 initializers, one tensor in memory at a time.

    Returns:
        The names of all values that hold nothing but these weights, wherever MNN may fold them to.
    """
    import onnx_ir as ir

    halves = set()
    with (folder / _WIDE_FILE).open("wb") as data:
        for node in tuple(graph):
            stored = node.inputs[0] if node.op_type == "Cast" else None
            if stored is None or stored.dtype != ir.DataType.FLOAT16 or stored.const_value is None:
                continue
            wide = np.ascontiguousarray(stored.const_value.numpy(), np.float32)
            weight, name = node.outputs[0], node.outputs[0].name
            value = ir.Value(name=name, shape=ir.Shape(wide.shape), type=ir.TensorType(ir.DataType.FLOAT))
            value.const_value = ir.ExternalTensor(
                _WIDE_FILE, data.tell(), wide.nbytes, ir.DataType.FLOAT,
                shape=ir.Shape(wide.shape), name=name or "", base_dir=folder,
            )  # fmt: skip
            wide.tofile(data)
            if isinstance(stored.const_value, ir.ExternalTensor):
                stored.const_value.release()  # else the pages of the whole file stay mapped
            weight.replace_all_uses_with(value)
            graph.remove(node, safe=True)
            graph.register_initializer(value)
            halves.add(value)
    for node in graph:
        given = {value for value in node.inputs if value is not None}
        floats = {value for value in given if value.dtype is None or value.dtype.is_floating_point()}
        if node.op_type in _MOVES and floats and floats <= halves:
            halves |= set(node.outputs)
    return frozenset(value.name for value in halves if value.name)


def _vectors(graph: ir.Graph, halves: frozenset[str]) -> dict[str, NDArray[np.float32]]:
    """The float32 initializers that are not weights: biases, norms, scalars."""
    import onnx_ir as ir

    constants = ((name, value.const_value) for name, value in graph.initializers.items() if name not in halves)
    return {
        name: np.array(constant.numpy(), np.float32)  # a copy, out of the mapped file
        for name, constant in constants
        if constant is not None and constant.dtype == ir.DataType.FLOAT
    }


def _all_values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.initializers.values(), *(output for node in graph for output in node.outputs)]
