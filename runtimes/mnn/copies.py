"""A component's graph for MNN's converter without its weights, and narrow copies of it with fingerprints for weights.

The copies are made of the real graph: its nodes, its names, and numbers of a narrow network where numbers depend on
the width. One narrow network is exported; what its constants and those of the real one have in common tells those of
any other width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ...export.graph import Graph, WeightSlot
from ...quantize.onnx_model import DATA_FILE
from ...stages.artifacts import OnnxModel, TensorSpec
from ..fingerprints import Fingerprints
from ..narrowing import NotAlikeError, Width, carried
from .graph import write_mnn_graph

if TYPE_CHECKING:
    import onnx_ir as ir

Array = NDArray[Any]
Use = tuple[int, int]  # (node, which of its inputs)
_INLINE_BELOW: Final = 1024  # bytes, as in the real model: MNN treats constants inside the file apart


@dataclass(frozen=True)
class Copy:
    """A narrow copy on disk."""

    file: Path
    fingerprints: Fingerprints
    constants: Mapping[str, tuple[Array, Array]]  # the graph's own by name: as they are here, and really


@dataclass(frozen=True)
class Network:
    """The real graph and what its width decides in it."""

    file: Path  # without weights
    slots: tuple[WeightSlot, ...]
    inputs: tuple[TensorSpec, ...]
    constants: Mapping[Use, Array]
    elements: Mapping[Use, int]  # that a Reshape, which reads such a constant, takes
    width: int


class Copies:
    """The real graph, and narrow copies of it at any width.

    Args:
        real: at `width`; `narrow`: the same architecture, exported at `narrow_width`.
        aliases: numbers of narrow copies, whatever their width, and the real ones for them.
        scratch: an empty folder.
    Raises:
        NotAlikeError: the two graphs differ in more than numbers.
    """

    def __init__(
        self,
        real: Graph,
        width: int,
        narrow: Graph,
        narrow_width: int,
        aliases: Mapping[int, int],
        scratch: Path,
    ) -> None:
        import onnx_ir as ir

        self.aliases = aliases

        self._scratch = scratch
        self._real, self._narrow = (
            _network(graph, scratch / name, units)
            for graph, name, units in ((real, "real", width), (narrow, "narrow", narrow_width))
        )
        places = [[(s.name, s.source, s.permute) for s in side.slots] for side in (self._real, self._narrow)]
        if places[0] != places[1] or len(self._real.inputs) != len(self._narrow.inputs):
            raise NotAlikeError("a narrow copy has other weights or inputs")
        _check_alike(ir.load(self._real.file).graph, ir.load(self._narrow.file).graph)
        self.specs = self._real.inputs
        self.inputs = {spec.name: spec.shape for spec in self.specs}
        self.shapes = {slot.source: slot.stored for slot in real.slots()}

    def at(self, width: Width) -> Copy:
        """The copy at `width`, written to a folder of its own.

        Raises:
            NotAlikeError: at that width, MNN would take constants for one that the real graph tells apart.
        """
        import onnx_ir as ir

        values = {use: self._at(width, use) for use in self._real.constants}
        shapes = {
            slot.source: self._shape(width, old.stored, slot.stored)
            for old, slot in zip(self._narrow.slots, self._real.slots, strict=True)
        }
        _check_told_apart(values, self._real.constants)
        _check_told_apart(_sides(shapes), _sides(self.shapes))
        fingerprints = Fingerprints(shapes)
        folder = self._scratch / str(width).replace("/", "_")
        folder.mkdir()
        model = ir.load(self._real.file)
        constants = {
            constant: (values[use], self._real.constants[use]) for use, constant in _put_constants(model.graph, values)
        }
        for value, old, new in zip(model.graph.inputs, self._narrow.inputs, self._real.inputs, strict=True):
            value.shape = ir.Shape(self._shape(width, old.shape, new.shape))
        for node in model.graph:
            for output in node.outputs:
                output.shape = None
        with (folder / DATA_FILE).open("wb") as data:
            for slot, same in zip(self._real.slots, self._narrow.slots, strict=True):
                _put(model.graph, slot.name, self._stub(width, same, slot, fingerprints, data))
        ir.save(model, folder / "model.onnx")
        return Copy(folder / "model.onnx", fingerprints, constants)

    def _shape(self, width: Width, narrow: tuple[int, ...], real: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self._number(width, a, b) for a, b in zip(narrow, real, strict=True))

    def _number(self, width: Width, narrow: int, real: int) -> int:
        if self.aliases.get(narrow) == real:
            return narrow
        return carried(narrow, real, (self._narrow.width, self._real.width), width)

    def _at(self, width: Width, use: Use) -> Array:
        real = self._real.constants[use]
        narrow = _spelt_out(self._narrow.constants[use], real, self._narrow.elements.get(use, 0))
        if narrow.shape != real.shape:
            raise NotAlikeError(f"a constant has the shape {narrow.shape} in a narrow copy, and really {real.shape}")
        if not np.issubdtype(real.dtype, np.integer):
            return real  # no float decides the form of a graph
        if width == self._narrow.width:
            return narrow
        numbers = [self._number(width, int(a), int(b)) for a, b in zip(narrow.flat, real.flat, strict=True)]
        return np.array(numbers, real.dtype).reshape(real.shape)

    def _stub(self, width: Width, old: WeightSlot, slot: WeightSlot, fingerprints: Fingerprints, data: Any) -> Any:
        import onnx_ir as ir

        values = fingerprints.patterns(slot.source).view(np.float32)
        values = values.transpose(slot.permute) if slot.permute else values
        values = np.ascontiguousarray(values).reshape(self._shape(width, old.shape, slot.shape))
        if 4 * prod(slot.shape) < _INLINE_BELOW:
            return ir.tensor(values, name=slot.name)
        start = data.tell()
        values.tofile(data)
        return ir.ExternalTensor(
            DATA_FILE, start, values.nbytes, ir.DataType.FLOAT,
            shape=ir.Shape(values.shape), name=slot.name, base_dir=Path(data.name).parent,
        )  # fmt: skip


def _network(graph: Graph, folder: Path, width: int) -> Network:
    import onnx_ir as ir

    (folder / "hollow").mkdir(parents=True)
    made = write_mnn_graph(_hollow(graph, folder / "hollow"), folder)
    slots = graph.slots()
    model = ir.load(made.file)
    constants = dict(_constants(model.graph, frozenset(slot.name for slot in slots)))
    return Network(made.file, slots, made.inputs, constants, dict(_elements(model.graph)), width)


def _hollow(graph: Graph, folder: Path) -> OnnxModel:
    """The graph as a model whose weights lie in a file that does not exist: nothing here reads one."""
    import onnx

    model, slots = onnx.load(str(graph.file)), graph.slots()
    names = {slot.name for slot in slots}
    kept = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for slot in slots:
        tensor = onnx.TensorProto(name=slot.name, dims=slot.shape, data_type=onnx.TensorProto.FLOAT)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", DATA_FILE), ("offset", 0), ("length", 4 * prod(slot.shape))):
            tensor.external_data.add(key=key, value=str(value))
        model.graph.initializer.append(tensor)
    onnx.save(model, str(folder / "model.onnx"))
    return OnnxModel(folder, graph.component, "fp32", graph.inputs, graph.outputs)


def _constants(graph: ir.Graph, slots: frozenset[str]) -> Iterator[tuple[Use, Array]]:
    for number, node in enumerate(graph):
        for index, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and value.name not in slots:
                assert value.const_value is not None
                yield (number, index), value.const_value.numpy()


def _elements(graph: ir.Graph) -> Iterator[tuple[Use, int]]:
    for number, node in enumerate(graph):
        shape = node.inputs[0].shape if node.op_type == "Reshape" and node.inputs[0] is not None else None
        if shape is not None and shape.is_static():
            yield (number, 1), prod(shape.numpy())


def _spelt_out(narrow: Array, real: Array, elements: int) -> Array:
    """A Reshape's sides, the one of -1 as a number if it is one in the real graph: exporters write -1 for a single
    head, which a narrow copy may have."""
    rest = prod(int(side) for side in narrow.flat if side != -1)
    if narrow.shape != real.shape or not elements or rest <= 0 or elements % rest:
        return narrow
    return np.where((narrow == -1) & (real != -1), elements // rest, narrow).astype(narrow.dtype)


def _put_constants(graph: ir.Graph, values: Mapping[Use, Array]) -> Iterator[tuple[Use, str]]:
    """Give constants other values; one that is used twice and has two values becomes two."""
    import onnx_ir as ir

    nodes, given = tuple(graph), dict[str, list[tuple[str, Array]]]()
    for (number, index), array in values.items():
        old = nodes[number].inputs[index]
        assert old is not None
        known = given.setdefault(str(old.name), [])
        name = next((name for name, other in known if np.array_equal(other, array)), None)
        if name is None:
            name = f"{old.name}.{len(known)}" if known else str(old.name)
            known.append((name, array))
            if name != old.name:
                graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name), type=old.type))
        if name != old.name:
            nodes[number].replace_input_with(index, graph.initializers[name])
        _put(graph, name, ir.tensor(array, name=name))
        yield (number, index), name


def _put(graph: ir.Graph, name: str, tensor: Any) -> None:
    import onnx_ir as ir

    if name not in graph.initializers:  # an attention over one place: its softmax is 1, and nothing reads a query
        raise NotAlikeError(f"nothing in the graph reads the weight {name}")
    value = graph.initializers[name]
    value.const_value, value.shape = tensor, ir.Shape(tensor.shape)


def _check_alike(real: ir.Graph, narrow: ir.Graph) -> None:
    """Node by node the same operation with the same attributes, on what the same nodes made."""
    nodes = tuple(tuple(graph) for graph in (real, narrow))
    if len(nodes[0]) != len(nodes[1]):
        raise NotAlikeError(f"{len(nodes[0])} nodes in the graph, {len(nodes[1])} in a narrow copy")
    made = [{output: (n, i) for n, node in enumerate(side) for i, output in enumerate(node.outputs)} for side in nodes]
    for one, two in zip(*nodes, strict=True):
        if one.op_type != two.op_type or len(one.outputs) != len(two.outputs) or _attributes(one) != _attributes(two):
            raise NotAlikeError(f"node {one.name!r} is {one.op_type}, or of other attributes, than {two.op_type}")
        if [_origin(v, made[0]) for v in one.inputs] != [_origin(v, made[1]) for v in two.inputs]:
            raise NotAlikeError(f"node {one.name!r} reads other values in a narrow copy")


def _attributes(node: ir.Node) -> dict[str, str]:
    return {name: str(attribute.value) for name, attribute in node.attributes.items()}


def _origin(value: ir.Value | None, made: Mapping[Any, Use]) -> Any:
    import onnx_ir as ir

    if value is None or value in made:
        return made.get(value)
    is_weight = value.is_initializer() and isinstance(value.const_value, ir.ExternalTensor)
    return value.name if is_weight or value.is_graph_input() else "constant"


def _sides(shapes: Mapping[str, tuple[int, ...]]) -> dict[Any, Array]:
    """The sides of weights: MNN writes a constant of each for a linear layer."""
    return {(name, axis): np.array([side]) for name, shape in shapes.items() for axis, side in enumerate(shape)}


def _check_told_apart(narrow: Mapping[Any, Array], real: Mapping[Any, Array]) -> None:
    """MNN takes equal constants for one. Those that are equal in a copy have to be equal in the real graph."""
    first: dict[tuple[str, tuple[int, ...], bytes], Any] = {}
    for use, value in narrow.items():
        kind = "f" if np.issubdtype(value.dtype, np.floating) else "i"  # what MNN makes of them
        known = first.setdefault((kind, value.shape, value.astype(f"{kind}8").tobytes()), use)
        if not np.array_equal(real[known], real[use]):
            raise NotAlikeError(f"two constants are {value.reshape(-1)[:8].tolist()} in a narrow copy and differ")
