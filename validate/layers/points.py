"""What PyTorch's modules hand to each other, in order: found once without weights, then saved as they pass by.

Hooks see the input and the output of every module. One tensor is often both, of several modules; it is one *point*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoints.config import architecture
from ...stages.artifacts import ComponentSource
from ...stages.stage import Stage

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Point:
    """A tensor between modules."""

    index: int  # in the order in which PyTorch makes them
    module: str  # the innermost module that made it
    kind: str  # that module's class
    shape: tuple[int, ...]
    keys: tuple[str, ...]  # "module.path:out", "module.path:in", and ":out" for the component's output

    @property
    def bytes(self) -> int:
        """In float32."""
        return 4 * prod(self.shape)


@dataclass(frozen=True, slots=True)
class Points:
    """The points of a component, and for every hook call of a forward pass, in order, the index of its point or -1."""

    folder: Path
    points: tuple[Point, ...]
    events: tuple[int, ...]
    digest: str = ""


@dataclass(frozen=True)
class FindPoints(Stage[Points], name="points", version=1, tools=("torch", "diffusers", "transformers")):
    """Find the points of an architecture, without weights."""

    source: ComponentSource
    size: tuple[int, int]  # height, width in pixels

    def key(self) -> Mapping[str, object]:
        config = architecture(self.source.config)
        return {"component": self.source.component, "config": config, "size": list(self.size)}

    def run(self, into: Path) -> Points:
        return Points(into, *find_points(self.source, self.size))


@dataclass(slots=True)
class _Seen:
    """The points of one forward pass. With every tensor kept alive, `id` tells them apart."""

    stack: list[tuple[str, str]] = field(default_factory=list)  # (path, class) of the modules that are running
    number: dict[int, int] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)
    made: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    keys: dict[str, list[int]] = field(default_factory=dict)
    events: list[int] = field(default_factory=list)  # of every hook call: the number of its point, or -1


def find_points(source: ComponentSource, size: tuple[int, int]) -> tuple[tuple[Point, ...], tuple[int, ...]]:
    """Run the component on the meta device, which computes shapes only.

    Returns:
        The points; and for every hook call of a forward pass, in order, the index of its point or -1. A pass with
        weights makes the same calls.
    """
    import torch

    from ...checkpoints import network
    from ...export import contract, modules

    module = modules.wrap(source, network.build(source))
    feeds = [
        torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
        for spec in contract.input_specs(source, size)
    ]
    seen = _Seen()

    def enter(path: str, kind: str, tensor: Tensor | None) -> None:
        _note(seen, f"{path}:in", tensor)
        seen.stack.append((path, kind))

    def leave(path: str, kind: str, tensor: Tensor | None) -> None:
        _note(seen, f"{path}:out", tensor)
        seen.stack.pop()

    # the inputs are no points: nothing has computed them
    seen.alive += feeds
    seen.number |= {id(feed): -1 for feed in feeds}
    with torch.no_grad(), hooks(module, enter, leave):
        module(*feeds)
    keys: dict[int, list[str]] = {}
    for key, numbers in seen.keys.items():
        if len(numbers) == 1:  # a module that is called twice has no single output
            keys.setdefault(numbers[0], []).append(key)
    points = tuple(
        Point(index, path, kind, shape, tuple(keys.get(index, ())))
        for index, (path, kind, shape) in enumerate(seen.made)
    )
    return points, tuple(seen.events)


def _note(seen: _Seen, key: str, tensor: Tensor | None) -> None:
    if tensor is None:
        seen.events.append(-1)
        return
    number = seen.number.get(id(tensor))
    if number is None:
        number = seen.number[id(tensor)] = len(seen.made)
        seen.alive.append(tensor)
        seen.made.append((*seen.stack[-1], tuple(tensor.shape)))
    seen.events.append(number)
    seen.keys.setdefault(key, []).append(number)


Hook = Callable[[str, str, "Tensor | None"], None]


@contextmanager
def hooks(module: nn.Module, enter: Hook, leave: Hook) -> Iterator[None]:
    """Call `enter` and `leave` around every submodule's forward with its path, its class, and its only float tensor.

    The tensor is None where a module takes or gives several, or none.
    """
    handles = []
    for name, part in module.named_modules():
        if name == "m":
            continue  # the wrapper around it has the same output, as a plain tensor
        path, kind = name.removeprefix("m."), type(part).__name__

        def before(_: Any, args: Any, kwargs: Any, path: str = path, kind: str = kind) -> None:
            enter(path, kind, _only_float([*args, *kwargs.values()]))

        def after(_: Any, args: Any, output: Any, path: str = path, kind: str = kind) -> None:
            leave(path, kind, _only_float(output if isinstance(output, tuple | list) else [output]))

        handles += [
            part.register_forward_pre_hook(before, with_kwargs=True),
            part.register_forward_hook(after),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _only_float(values: Sequence[Any]) -> Tensor | None:
    import torch

    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return tensors[0] if len(tensors) == 1 and tensors[0].is_floating_point() and tensors[0].dim() else None
