"""Parts of an `.mnn` model: its loader takes the names of any tensors as inputs and outputs, and drops the rest."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from ...stages.artifacts import TargetModel
from ...stages.errors import ToolCrashed
from ..protocol import Array, Closing, Feeds
from ..taps import Node, Wiring, boundaries, needed_feeds
from .arithmetic import proven_in
from .mnn_file import MnnFile
from .session import load_part, new_runtime

if TYPE_CHECKING:
    from ...export.graph import Graph

# What MNN's converter appends to the name of the ONNX node that an operation stems from.
_MATMUL: Final = "__matmul_converted"
_UNARY: Final = 101  # OpType of activations
# Of what a part reads and makes; a single module may take more. Loading a part reads the model's file, so that large
# models have larger parts: beside the file they are small.
_PART_BYTES: Final = 2**25
_FILE_SHARE: Final = 1 / 4
_OPEN: Final = 4  # parts that may still grow: residual branches and attention need no more


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
        streamed=True,
    )


def _module(name: str, modules: Mapping[str, str]) -> str:
    return modules.get(name.removesuffix(_MATMUL), "")


class MnnTaps(Closing):
    """Satisfies `TapSession`. A piece is computed in small parts, of which each loads its own weights and no others.

    So what is held at a time are the tensors of a few modules, however long the piece is. A part may not both read and
    make a tensor: MNN has none that is input and output in one run.
    """

    def __init__(self, model: TargetModel, threads: int) -> None:
        file = MnnFile(model.folder / model.files[0])
        file.check_weights()
        self._file = file
        self._name = f"mnn {model.component}"
        self._threads = threads
        self._part_bytes = max(_PART_BYTES, int(_FILE_SHARE * file.path.stat().st_size))
        self._arithmetic = proven_in(model)
        self._makers = {tensor: op.inputs for op in file.wires() for tensor in op.outputs}
        self.partial_runs = 0

    def run(self, feeds: Feeds, wanted: Mapping[str, int]) -> Iterator[tuple[str, Array]]:
        if unknown := [tensor for tensor in wanted if tensor not in self._makers]:
            raise ToolCrashed(f"{self._name} has no tensor {unknown[0]!r}")
        self.partial_runs += 1
        needs = {tensor: needed_feeds(tensor, self._makers, {*feeds, *wanted}) for tensor in wanted}
        sizes = {name: feeds[name].nbytes for name in feeds} | dict(wanted)
        parts = parts_of(needs, sizes, frozenset(feeds), self._part_bytes)
        readers = Counter(name for part in parts for name in part.inputs if name not in feeds)
        with tempfile.TemporaryDirectory(prefix="mnn.") as folder:
            made: dict[str, Path] = {}  # what later parts read: on the disk, as feeds are

            def value(name: str) -> Array:
                return np.asarray(np.load(made[name], mmap_mode="r")) if name in made else feeds[name]

            for part in parts:
                for name, result in self._run(value, sorted(part.inputs), part.made):
                    if name in readers:
                        made[name] = Path(folder, f"{len(made)}.npy")
                        np.save(made[name], result)
                    yield name, result
                for name in part.inputs & readers.keys():
                    readers[name] -= 1
                    if not readers[name]:
                        made[name].unlink()

    def _run(
        self, value: Callable[[str], Array], given: Sequence[str], wanted: Sequence[str]
    ) -> Iterator[tuple[str, Array]]:
        import MNN.expr as expr

        runtime = new_runtime(self._threads, self._arithmetic)  # one for all would keep the memory of the largest
        module = load_part(self._file, list(given), list(wanted), runtime)
        kinds = {"float32": expr.float, "int32": expr.int}
        variables = []
        for name in given:
            array = np.ascontiguousarray(value(name))
            # not expr.const, which has a copy of its own for a moment
            variables.append(expr.placeholder(list(array.shape), expr.NCHW, kinds[array.dtype.name]))
            variables[-1].write(array)
            del array
        results = module.forward(variables)
        if len(results) != len(wanted):
            raise ToolCrashed(f"{self._name}, in part, gave {len(results)} outputs instead of {len(wanted)}")
        del variables, module, runtime  # hundreds of MiB of weights and of the pool
        for name in wanted:
            result = expr.convert(results.pop(0), expr.NCHW)
            yield name, result.read()  # a view of it, good until the next one is asked for
            del result
        expr.gc(True)  # else MNN keeps what the results lay in

    def close(self) -> None:
        """Nothing is held between runs."""


@dataclass
class Part:
    """What is loaded and computed at once."""

    made: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    bytes: int = 0

    @property
    def inputs(self) -> frozenset[str]:
        return frozenset(self.read - set(self.made))

    def with_one_more(self, tensor: str, given: frozenset[str], size: Mapping[str, int]) -> Part:
        new = given - self.read - set(self.made)
        held = self.bytes + size[tensor] + sum(size[name] for name in new)
        return Part([*self.made, tensor], self.read | given, held)


def parts_of(
    needs: Mapping[str, frozenset[str]], size: Mapping[str, int], feeds: frozenset[str], most: int
) -> list[Part]:
    """Split a piece into few parts of few bytes, in an order in which they can be computed.

    Args:
        needs: tensor -> what it is computed from, of the feeds and of the tensors before it.
        size: bytes of each tensor.
        feeds: what is fed even where it is also computed.
        most: bytes of what a part reads and makes, unless it makes one tensor only.
    """
    apart = all(given <= feeds for given in needs.values())  # then their order does not matter
    parts: list[Part] = []
    for tensor, given in needs.items():
        for place in range(max(0, len(parts) - (_OPEN if apart else 1)), len(parts)):
            longer = parts[place].with_one_more(tensor, given, size)
            if longer.bytes <= most and not longer.read & feeds & set(longer.made):
                parts[place] = longer
                break
        else:
            parts.append(Part().with_one_more(tensor, given, size))
    return parts
