"""Looking into a loaded model: its tensors by name, and which of them are the boundaries of PyTorch's modules.

A *tap* is a tensor of a runtime that is also the input or the output of a PyTorch module. Between the taps before it
and a tap lies the work of one module, and a runtime can be asked for that work alone: give it the taps before,
take the tap. docs/decisions/0045.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from ..stages.artifacts import ComponentSource, TargetModel
from ..stages.stage import Runner
from .protocol import Array, Feeds


@dataclass(frozen=True, slots=True)
class Node:
    """One operation of a runtime's graph. `module` is PyTorch's path, empty where it is not known."""

    op: str
    module: str
    inputs: tuple[str, ...]  # names of tensors, constants included
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wiring:
    """A runtime's graph in the order of its execution, and the module boundaries among its tensors.

    `keys` maps a tensor to what it is in PyTorch, each "module.path:in" or "module.path:out"; ":out" is the output of
    the whole component. A tensor with keys that no node makes can be fed, but not be had. With `batchless`, tensors
    lack the leading axis of PyTorch's, which is 1.
    """

    nodes: tuple[Node, ...]
    keys: Mapping[str, tuple[str, ...]]
    batchless: bool = False
    flat: frozenset[str] = frozenset()  # tensors laid out as [rows, columns, 1, 1], columns being PyTorch's last axis
    streamed: bool = False  # whether feeds that are mapped from files take no memory worth counting
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of tensors, where the graph states them


class TapSession(Protocol):
    """A model of which parts can be run."""

    @property
    def partial_runs(self) -> int:
        """How many parts of the model were run so far, each of its operations once in a part."""
        ...

    def run(self, feeds: Feeds, wanted: Mapping[str, int]) -> Iterator[tuple[str, Array]]:
        """Compute the tensors `wanted` from `feeds`, tensors that stand in for all that comes before them.

        A tensor may be both: then it is computed from the other feeds, and what comes after it reads the feed.
        Values are yielded as they come, NaN included, in any order. Feeds and results of a run can be larger than the
        model: hold on to neither longer than it takes, to a result until the next one is asked for. Feeds may be
        read from a disk each time that one is looked up.

        Args:
            wanted: tensors, in an order in which they can be computed, and the bytes of each.

        Raises:
            ToolCrashed: the runtime refuses, or has no such tensor.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Tapped(Protocol):
    """A target that can be looked into. `validate --layers` needs it; nothing else does."""

    def wiring(self, model: TargetModel, source: ComponentSource, size: tuple[int, int], run: Runner) -> Wiring:
        """The graph of `model`, which was built from `source` for pictures of `size`, and its module boundaries."""
        ...

    def open_taps(self, model: TargetModel, *, threads: int) -> TapSession:
        """Open `model` for partial runs, in this process."""
        ...


def needed_feeds(tensor: str, makers: Mapping[str, Sequence[str]], feeds: Container[str]) -> frozenset[str]:
    """The feeds that `tensor` is computed from, a feed of its own name aside.

    Args:
        makers: tensor -> the tensors that its node reads.
    """
    found, seen, open_ends = set(), {tensor}, list(makers[tensor])
    while open_ends:
        name = open_ends.pop()
        if name in feeds:
            found.add(name)
        elif name not in seen and name in makers:
            seen.add(name)
            open_ends += makers[name]
    return frozenset(found)


def boundaries(nodes: Sequence[Node], inputs: Iterable[str], outputs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The module boundaries of a graph whose nodes know their modules: tensor -> keys as in `Wiring`.

    A tensor that is made inside a module and read outside of it is an output of that module, and the other way
    round an input. Modules with several of one kind have no such key: which is which cannot be told.
    """
    live = live_tensors(nodes, inputs)
    nodes = inherit_modules([node for node in nodes if live & set(node.outputs)])
    maker = {tensor: node.module for node in nodes for tensor in node.outputs}
    readers: dict[str, list[str]] = {}
    for node in nodes:
        for tensor in node.inputs:
            if tensor in live:
                readers.setdefault(tensor, []).append(node.module)
    found: dict[str, dict[str, None]] = {}
    for tensor in maker | readers:
        for module in ancestors(maker[tensor]) if tensor in maker else ():
            if any(not inside(reader, module) for reader in readers.get(tensor, ())) or tensor in outputs:
                found.setdefault(f"{module}:out", {})[tensor] = None
        for reader in readers.get(tensor, ()):
            for module in ancestors(reader):
                if module and (tensor not in maker or not inside(maker[tensor], module)):
                    found.setdefault(f"{module}:in", {})[tensor] = None
    found[":out"] = {outputs[0]: None}
    keys: dict[str, tuple[str, ...]] = {}
    for key, tensors in found.items():
        if len(tensors) == 1:
            (tensor,) = tensors
            keys[tensor] = (*keys.get(tensor, ()), key)
    return keys


def live_tensors(nodes: Iterable[Node], inputs: Iterable[str]) -> set[str]:
    """Names of the tensors that depend on `inputs`; the others are constants, whatever computes them."""
    live = set(inputs)
    for node in nodes:
        if live & set(node.inputs):
            live |= set(node.outputs)
    return live


def inherit_modules(nodes: Sequence[Node]) -> list[Node]:
    """Give a node without a module that which its neighbours share."""
    maker = {tensor: node.module for node in nodes for tensor in node.outputs if node.module}
    readers: dict[str, list[str]] = {}
    for node in nodes:
        for tensor in node.inputs:
            if node.module:
                readers.setdefault(tensor, []).append(node.module)
    named = []
    for node in nodes:
        if not node.module:
            around = [maker[tensor] for tensor in node.inputs if tensor in maker]
            around += [reader for tensor in node.outputs for reader in readers.get(tensor, ())]
            node = replace(node, module=common_module(around))
            maker |= dict.fromkeys(node.outputs, node.module)
        named.append(node)
    return named


def ancestors(module: str) -> list[str]:
    """`module` and all that hold it, the whole component ("") last."""
    parts = module.split(".") if module else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def inside(module: str, holder: str) -> bool:
    """Whether `module` is `holder` or a part of it."""
    return not holder or module == holder or module.startswith(f"{holder}.")


def common_module(modules: Iterable[str]) -> str:
    """The innermost module that holds all of `modules`."""
    paths = [module.split(".") if module else [] for module in modules]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) != 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
