"""Parts of an ncnn model: an extractor takes any blob as input and computes only what lies between.

The graph has no names of PyTorch's, but its weights have: the layout says which parameter each one is, so that a
layer with weights is a known module, its output is that module's, and its input too. An attention is one layer with
the weights of four; each of its projections is therefore also run by itself, as the InnerProduct that it is.
"""

from __future__ import annotations

import tempfile
from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...stages.artifacts import TargetModel
from ...stages.errors import BundleError, ToolCrashed
from ..arithmetic import PROVEN
from ..protocol import Array, Closing, Feeds
from ..taps import Node, Wiring, common_module, needed_feeds
from . import layout
from .arithmetic import net_with, options_of
from .param import Layer, parse, render
from .session import open_net
from .slots import slots_of, spans_of
from .trace import TracedNcnn

_SPLIT: Final = "Split"  # ncnn's way to let several layers read a blob
_ATTENTION: Final = "MultiHeadAttention"
ROLES: Final = ("q", "k", "v", "out")  # its projections, in the order of their weights


def read_wiring(model: TargetModel, traced: TracedNcnn) -> Wiring:
    """The layers of `model`, with the modules that their weights belong to.

    Raises:
        BundleError: the graph is not the one that the layout of `traced` is about.
    """
    file = model.folder / model.files[0]
    layers = parse(file.read_text(), file.name)
    traced_layers = parse(traced.param.read_text(), traced.param.name)
    missing = {layer.name for layer in traced_layers if layer.type != _SPLIT} - {layer.name for layer in layers}
    if missing:
        raise BundleError(
            f"{file} is not the graph that pnnx makes of this checkpoint now, it lacks {min(missing)}: "
            "its layers cannot be named",
            hint="convert the checkpoint again with the versions that are installed",
        )
    return wiring_of(layers, traced_layers, traced.blobs(), model.outputs[0].name)


def wiring_of(layers: Sequence[Layer], traced: Sequence[Layer], blobs: Sequence[layout.Blob], output: str) -> Wiring:
    """The wiring of a graph.

    Args:
        layers: of the model. Where weights have few bits, several layers `NAME.more` stand for one of `traced`.
        traced: of the graph as pnnx made it, whose weights are `blobs`.
    """
    owners: dict[str, dict[str, str]] = {}  # traced layer -> role of a weight -> module
    for blob in blobs:
        if blob.kind == layout.PARAMETER:
            owners.setdefault(blob.slot.layer, {})[blob.slot.role] = blob.name.rpartition(".")[0]
    found = {layer.name: layer for layer in layers}
    origin = _origins(traced)
    keys: dict[str, list[str]] = {}
    nodes: list[Node] = []
    for layer in traced:
        inputs = tuple(origin.get(blob, blob) for blob in layer.inputs)
        modules = owners.get(layer.name, {})
        if layer.type == _ATTENTION:
            whole = found[layer.name].type == _ATTENTION
            for role in ROLES:
                module = modules[f"{role}_weight"]
                read = _projected(layer.name, inputs, role) if whole or role != "out" else None
                name = f"{layer.name}/{role}" if whole else f"{layer.name}.{role}"
                if read is None:
                    read = found[name].inputs[0]
                if whole:
                    nodes.append(Node("InnerProduct", module, (read,), (name,)))
                if whole or role != "out":
                    keys[name] = [f"{module}:out"]
                keys.setdefault(read, []).append(f"{module}:in")
            keys[layer.outputs[0]] = [f"{modules['out_weight']}:out"]
        elif len(set(modules.values())) == 1 and len(layer.outputs) == 1:
            (module,) = set(modules.values())
            keys.setdefault(layer.outputs[0], []).append(f"{module}:out")
            if len(inputs) == 1 and not _pads_unevenly(layer):
                keys.setdefault(inputs[0], []).append(f"{module}:in")
    keys.setdefault(output, []).append(":out")
    origin = _origins(layers)
    for layer in layers:
        if layer.type != _SPLIT:
            inputs = tuple(origin.get(blob, blob) for blob in layer.inputs)
            nodes.append(Node(layer.type, _module(layer.name, owners), inputs, layer.outputs))
    given = {blob for node in nodes if not node.inputs for blob in node.outputs}
    known = {blob: tuple(each) for blob, each in keys.items() if blob not in given}
    return Wiring(tuple(nodes), known, batchless=True, streamed=True)


def _origins(layers: Sequence[Layer]) -> dict[str, str]:
    """Each output of a Split -> the blob that it copies."""
    origin: dict[str, str] = {}
    for layer in layers:
        if layer.type == _SPLIT:
            origin |= dict.fromkeys(layer.outputs, origin.get(layer.inputs[0], layer.inputs[0]))
    return origin


def _module(name: str, owners: Mapping[str, Mapping[str, str]]) -> str:
    """The module that a layer belongs to; a layer `NAME.more` belongs to that of NAME."""
    base, _, more = name.rpartition(".")
    if name in owners:
        return common_module(owners[name].values())
    modules = owners.get(base, {})
    return modules.get(f"{more}_weight") or (common_module(modules.values()) if modules else "")


def _pads_unevenly(layer: Layer) -> bool:
    """Whether a convolution has swallowed a padding that PyTorch does outside of it: its inputs then differ."""
    left, top = layer.number(4), layer.number(14, layer.number(4))
    return layer.type == "Convolution" and (left != layer.number(15, left) or top != layer.number(16, top))


def _projected(name: str, inputs: Sequence[str], role: str) -> str:
    """What a projection of an attention reads. The last one reads what only the attention itself has seen."""
    if role == "out":
        return f"{name}/mixed"
    return inputs[min(ROLES.index(role), len(inputs) - 1)]


@dataclass(frozen=True)
class Projection:
    """One projection of an attention as a net of its own: a graph, and its bytes in the model's `.bin`."""

    param: str
    file: Path
    start: int
    end: int


def projections(layers: Sequence[Layer], weights: Path) -> dict[str, Projection]:
    """The projections of every attention. An InnerProduct reads its weight and its bias just as an attention does."""
    spans = {(slot.layer, slot.role): (start, end) for slot, start, end in spans_of(layers, weights)}
    found = {}
    for layer in layers:
        if layer.type != _ATTENTION:
            continue
        for role in ROLES:
            start, _ = spans[layer.name, f"{role}_weight"]
            _, end = spans[layer.name, f"{role}_bias"]
            size = next(s.elements for s in slots_of([layer]) if s.role == f"{role}_weight")
            outputs = next(s.elements for s in slots_of([layer]) if s.role == f"{role}_bias")
            net = [
                Layer("Input", "x", (), ("x",), {}),
                Layer("InnerProduct", "y", ("x",), ("y",), {0: str(outputs), 1: "1", 2: str(size)}),
            ]
            found[f"{layer.name}/{role}"] = Projection(render(net), weights, start, end)
    return found


class NcnnTaps(Closing):
    """Satisfies `TapSession`. The net is loaded whole, once; every run computes what it needs.

    Raises:
        ModelError: ncnn refuses the files.
    """

    def __init__(self, model: TargetModel, threads: int) -> None:
        import ncnn

        self._ncnn: Any = ncnn
        self._net: Any = open_net(model, threads)
        # The net's own pools keep what was freed, for the next run of the same shapes; here each run has others.
        self._blobs: Any = ncnn.PoolAllocator()
        self._work: Any = ncnn.PoolAllocator()
        self._name = f"ncnn {model.component}"
        layers = parse((model.folder / model.files[0]).read_text())
        self._makers: dict[str, Sequence[str]] = {blob: layer.inputs for layer in layers for blob in layer.outputs}
        self._projections = projections(layers, model.folder / model.files[1])
        origin = _origins(layers)
        for layer in layers:
            if layer.type == _ATTENTION:
                inputs = [origin.get(blob, blob) for blob in layer.inputs]
                for role in ROLES:
                    self._makers[f"{layer.name}/{role}"] = (_projected(layer.name, inputs, role),)
        self._threads = threads
        self.partial_runs = 0

    def run(self, feeds: Feeds, wanted: Mapping[str, int]) -> Iterator[tuple[str, Array]]:
        if unknown := [tensor for tensor in wanted if tensor not in self._makers]:
            raise ToolCrashed(f"{self._name} has no blob {unknown[0]!r}")
        self.partial_runs += 1
        # Each from the nearest blobs before it, by an extractor of its own: one for all would keep every blob.
        needs: dict[str, frozenset[str]] = {}
        for tensor in wanted:
            needs[tensor] = needed_feeds(tensor, self._makers, {*feeds, *needs})
        readers = Counter(name for given in needs.values() for name in given if name not in feeds)
        made: dict[str, Array] = {}
        for tensor, given in needs.items():
            compute = self._project if tensor in self._projections else self._extract
            made[tensor] = compute(tensor, given, ChainMap(made, feeds))  # type: ignore[arg-type]
            for name in given & readers.keys():
                readers[name] -= 1
                if not readers[name]:
                    del made[name]
            yield tensor, made[tensor] if tensor in readers else made.pop(tensor)

    def _extract(self, tensor: str, given: Iterable[str], values: Feeds) -> Array:
        extractor = self._net.create_extractor()
        extractor.set_blob_allocator(self._blobs)
        extractor.set_workspace_allocator(self._work)
        for name in given:
            array = np.ascontiguousarray(values[name])
            mat = self._ncnn.Mat(array).clone()  # which owns its memory: the other one is the array's
            if status := extractor.input(name, mat):
                raise ToolCrashed(f"{self._name} does not take {name} (status {status})")
            del array, mat
        status, mat = extractor.extract(tensor)
        if status:
            raise ToolCrashed(f"{self._name} gave no {tensor} (status {status})")
        value = np.array(mat)
        del extractor, mat
        self._blobs.clear()
        self._work.clear()
        return value

    def _project(self, name: str, given: Iterable[str], values: Feeds) -> Array:
        """One projection of an attention, which reads [tokens, channels]."""
        (source,) = self._makers[name]
        value = values[source] if source in given else self._extract(source, given, values)
        projection = self._projections[name]
        net = net_with(options_of(PROVEN), self._threads)
        with tempfile.TemporaryDirectory(prefix="ncnn.") as folder:
            param, weights = Path(folder, "param"), Path(folder, "bin")
            param.write_text(projection.param)
            with projection.file.open("rb") as stream:
                stream.seek(projection.start)
                weights.write_bytes(stream.read(projection.end - projection.start))
            if net.load_param(str(param)) or net.load_model(str(weights)):
                raise ToolCrashed(f"{self._name} does not run {name} by itself")
        extractor = net.create_extractor()
        extractor.input("x", self._ncnn.Mat(np.ascontiguousarray(value)).clone())
        status, mat = extractor.extract("y")
        if status:
            raise ToolCrashed(f"{self._name} gave no {name} (status {status})")
        result = np.array(mat)
        del extractor, mat  # ncnn ends the process when a net goes before what it has allocated
        net.clear()
        return result

    def close(self) -> None:
        if self._net is not None:
            self._net.clear()
            self._net = None
