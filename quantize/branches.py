"""Low-rank branches as nodes of a graph: y = rest(x) + up(down(x)), for runtimes whose layers hold their weights.

The layer keeps its weight's name, which then stands for the rest; the factors are weights of their own:
docs/decisions/0040.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ..export.graph import Graph, WeightSlot, write_slots
from ..stages.errors import ExportError
from ..stages.stage import Stage
from .low_rank import DOWN, UP


@dataclass(frozen=True)
class BranchGraph(Stage[Graph], name="branch", version=1, tools=("onnx",)):
    """Graph -> the same Graph with a branch beside each layer of `ranks`; outputs and modules keep their names."""

    graph: Graph
    ranks: tuple[tuple[str, int], ...]  # parameter, rank of its branch

    def run(self, into: Path) -> Graph:
        import onnx

        model, ranks = onnx.load(str(self.graph.file)), dict(self.ranks)
        writer = _Writer(model)
        slots = list(self.graph.slots())
        for slot in tuple(slots):
            if slot.source in ranks:
                slots += writer.add(slot, ranks[slot.source])
        writer.finish()
        onnx.save(model, str(into / "graph.onnx"))
        write_slots(tuple(slots), into)
        return replace(self.graph, folder=into, digest="")


def _is_linear(node: Any, slot: WeightSlot) -> bool:
    """Whether a matrix product is that of a linear layer: x W^T."""
    if node.op_type == "MatMul":
        return slot.permute == (1, 0)
    values = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
    values |= {entry.name: entry.f if entry.name in ("alpha", "beta") else entry.i for entry in node.attribute}
    turned = (slot.permute == (1, 0)) != bool(values["transB"])
    return turned and values["transA"] == 0 and values["alpha"] == values["beta"] == 1.0


class _Writer:
    """Puts nodes of branches behind the layers of a model, an `onnx.ModelProto`."""

    def __init__(self, model: Any) -> None:
        self._graph = model.graph
        self._users: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._constants = {tensor.name for tensor in model.graph.initializer} | {v.name for v in model.graph.input}
        self._after: dict[str, list[Any]] = {}  # output of a node -> what comes behind it

    def add(self, slot: WeightSlot, rank: int) -> tuple[WeightSlot, WeightSlot]:
        """A branch for every layer that uses the weight of `slot`; returns the factors.

        Raises:
            ExportError: something else than a linear layer or convolution uses it.
        """
        rows, columns = slot.stored[0], prod(slot.stored[1:])
        users = self._users.get(slot.name, [])
        kinds = {(node.op_type, node.input[1]) for node in users}
        turned = kinds in ({("MatMul", slot.name)}, {("Gemm", slot.name)})  # the factors are, for MatMul
        if kinds == {("Conv", slot.name)} and slot.permute is None and slot.shape == slot.stored:
            shapes: Any = ((rank, *slot.shape[1:]), (rows, rank, *(1 for _ in slot.shape[2:])))
        elif turned and all(_is_linear(node, slot) for node in users):
            shapes = ((columns, rank), (rank, rows))
        else:
            raise ExportError(
                f"weight {slot.source!r} is used by {', '.join(sorted({node.op_type for node in users}))}, "
                "beside which no low-rank branch is known",
                hint="give its module a scheme without a branch by a recipe rule",
            )
        permute = (1, 0) if turned else None
        factors = [
            WeightSlot(f"{slot.name}{tag}", f"{slot.source}{tag}", stored, permute, shape)
            for tag, stored, shape in zip((DOWN, UP), ((rank, columns), (rows, rank)), shapes, strict=True)
        ]
        for factor in factors:
            self._declare(factor)
        for node in users:
            self._branch(node, factors[0].name, factors[1].name)
        return factors[0], factors[1]

    def _declare(self, factor: WeightSlot) -> None:
        from onnx import TensorProto, helper

        self._graph.input.append(helper.make_tensor_value_info(factor.name, TensorProto.FLOAT, factor.shape))

    def _branch(self, node: Any, down: str, up: str) -> None:
        last = self._with_bias(node)
        result = last.output[0]
        stem = f"{result}.low_rank"
        conv = node.op_type == "Conv"
        first = self._made(node, "Conv" if conv else "MatMul", [node.input[0], down], f"{stem}.down")
        if conv:  # strides and pads; the kernel is as large
            first.attribute.extend(node.attribute)
        second = self._made(node, "Conv" if conv else "MatMul", [first.output[0], up], f"{stem}.up")
        total = self._made(node, "Add", [f"{result}.rest", second.output[0]], result)
        last.output[0] = f"{result}.rest"
        self._after[last.output[0]] = [first, second, total]

    def _with_bias(self, node: Any) -> Any:
        """The node itself, or the Add of its bias: converters merge the two, so nothing may come between them."""
        users = self._users.get(node.output[0], [])
        is_bias = len(users) == 1 and users[0].op_type == "Add" and set(users[0].input) & self._constants
        return users[0] if node.op_type == "MatMul" and is_bias else node

    def _made(self, origin: Any, op: str, inputs: list[str], output: str) -> Any:
        from onnx import helper

        node = helper.make_node(op, inputs, [output], name=f"{output}.{op}")
        node.metadata_props.extend(origin.metadata_props)
        return node

    def finish(self) -> None:
        """Put the new nodes into the graph, each behind the layer that it belongs to."""
        nodes = []
        for node in self._graph.node:
            nodes += [node, *self._after.get(node.output[0], ())]
        del self._graph.node[:]
        self._graph.node.extend(nodes)
