"""Parts of an `.mnn` model: its loader takes the names of any tensors as inputs and outputs, and drops the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from ...pipeline.artifacts import TargetModel
from ...pipeline.errors import ToolCrashed
from ..protocol import Array, Closing, Feeds
from ..taps import Node, Wiring, boundaries, needed_feeds
from .mnn_file import MnnFile
from .session import load_part, new_runtime, rounds_activations

if TYPE_CHECKING:
    from ...export.graph import Graph

# What MNN's converter appends to the name of the ONNX node that an operation stems from.
_MATMUL: Final = "__matmul_converted"
_UNARY: Final = 101  # OpType of activations


def read_wiring(model: TargetModel, graph: Graph) -> Wiring:
    """The model's own graph, with modules and boundaries by the names that it shares with the ONNX `graph`.

    A tensor counts as the ONNX tensor of its name only where the operation that makes it has the name too: the
    optimiser swaps operations (it moves an activation to the other side of a Reshape) and leaves the names in place.
    Then the operation is the one to trust, and its result still has the layout of a matrix product.
    """
    import onnx

    source = onnx.load(str(graph.file)).graph
    weights = {slot.name for slot in graph.slots()}
    nodes = [
        Node(
            node.op_type,
            next((entry.value for entry in node.metadata_props if entry.key == "module"), ""),
            tuple(name for name in node.input if name not in weights),
            tuple(node.output),
        )
        for node in source.node
    ]
    outputs = [spec.name for spec in graph.outputs]
    known = boundaries(nodes, [spec.name for spec in graph.inputs], outputs)
    modules = {tensor: node.module for node in nodes for tensor in node.outputs}
    wires = MnnFile(model.folder / model.files[0]).wires()
    kept = {op.name: op.name for op in wires if op.outputs[:1] == (op.name,)}
    kept |= {name: name for name in outputs}
    flat = {}
    for op in wires:
        name = op.name.removesuffix(_MATMUL)
        if name not in kept and (op.name != name or op.type == _UNARY):
            flat[name] = op.outputs[0]
    trusted = {*kept, *flat.values(), *(op.outputs[0] for op in wires if op.name.endswith(_MATMUL))}
    return Wiring(
        tuple(
            Node(str(op.type), _module(op.name, modules) if op.outputs[0] in trusted else "", op.inputs, op.outputs)
            for op in wires
        ),
        {tensor: known[name] for name, tensor in (flat | kept).items() if name in known},
        flat=frozenset(flat.values()),
        exclusive=True,
    )


def _module(name: str, modules: Mapping[str, str]) -> str:
    return modules.get(name.removesuffix(_MATMUL), "")


class MnnTaps(Closing):
    """Satisfies `TapSession`. Every run loads what it needs of the model, and nothing else.

    MNN has no tensor that is input and output in one run, so tensors that depend on each other are computed in turns.
    """

    def __init__(self, model: TargetModel, threads: int) -> None:
        file = MnnFile(model.folder / model.files[0])
        file.check_weights()
        self._file = file
        self._name = f"mnn {model.component}"
        self._threads = threads
        self._rounded = rounds_activations(model)
        self._makers = {tensor: op.inputs for op in file.wires() for tensor in op.outputs}
        self.partial_runs = 0

    def run(self, feeds: Feeds, wanted: Sequence[str]) -> Iterator[tuple[str, Array]]:
        if unknown := [tensor for tensor in wanted if tensor not in self._makers]:
            raise ToolCrashed(f"{self._name} has no tensor {unknown[0]!r}")
        needs = {tensor: needed_feeds(tensor, self._makers, feeds) for tensor in wanted}
        for turn in _turns(needs):
            given = set().union(*(needs[tensor] for tensor in turn))
            yield from self._run(feeds, sorted(given), turn)

    def _run(self, feeds: Feeds, given: list[str], wanted: list[str]) -> Iterator[tuple[str, Array]]:
        import MNN.expr as expr

        runtime = new_runtime(self._threads, rounded=self._rounded)  # one for all would keep the memory of the largest
        module = load_part(self._file, given, wanted, runtime)
        self.partial_runs += 1
        kinds = {"float32": expr.float, "int32": expr.int}
        variables = []
        for name in given:
            array = np.ascontiguousarray(feeds[name])
            variables.append(expr.const(array, list(array.shape), expr.NCHW, kinds[array.dtype.name]))
            del array
        results = module.forward(variables)
        if len(results) != len(wanted):
            raise ToolCrashed(f"{self._name}, in part, gave {len(results)} outputs instead of {len(wanted)}")
        del variables, module, runtime  # hundreds of MiB of weights and of the pool
        for name in wanted:
            result = expr.convert(results.pop(0), expr.NCHW)
            yield name, result.read()  # a view of it, good until the next one is asked for

    def close(self) -> None:
        """Nothing is held between runs."""


def _turns(needs: Mapping[str, frozenset[str]]) -> list[list[str]]:
    """Split tensors into as few groups as a greedy choice finds, so that no group both computes and reads a tensor."""
    turns: list[tuple[list[str], set[str]]] = []
    for tensor, given in needs.items():
        for made, read in turns:
            if tensor not in read and not given & set(made):
                break
        else:
            made, read = [], set()
            turns.append((made, read))
        made.append(tensor)
        read |= given
    return [made for made, _ in turns]
