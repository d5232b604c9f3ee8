"""A runtime's graph, cut where its tensors are PyTorch's: each segment is the work of one module."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ...runtimes.taps import Wiring, common_module
from ...stages.errors import ModelError
from ..tolerances import HALF_LAYER_TOLERANCE, LAYER_TOLERANCE, ROUNDING_LAYER_TOLERANCE
from .points import Point


@dataclass(frozen=True, slots=True)
class Segment:
    """The nodes between the taps before a tap and the tap."""

    tensor: str  # the tap, by the runtime's name
    point: int  # the same tensor in PyTorch
    module: str  # whose work it is: the innermost module that holds every node of the segment
    op: str  # PyTorch's class of the module that makes the tensor
    feeds: tuple[str, ...]  # taps before it, and inputs of the component
    needed_db: float = LAYER_TOLERANCE.min_snr_db  # that the work must reach


def taps_of(wiring: Wiring, points: Sequence[Point]) -> dict[str, Point]:
    """Tensor -> the point that it is.

    A tap that stands for several points is the first of them: others are the same values (what PyTorch computes twice
    and the exporter once), or come from it by work that is done later in the runtime. It may have another shape than
    its point, of as many numbers: see `reshaped`.

    Raises:
        ModelError: the component's output is no tap, so its graph and PyTorch's modules do not belong together.
    """
    at = {key: point for point in points for key in point.keys}
    taps: dict[str, Point] = {}
    for tensor, keys in wiring.keys.items():
        count = prod(wiring.shapes[tensor]) if tensor in wiring.shapes else None
        if same := [at[key] for key in keys if key in at and count in (None, prod(at[key].shape))]:
            taps[tensor] = min(same, key=lambda point: point.index)
    if not any(":out" in wiring.keys[tensor] for tensor in taps):
        raise ModelError("the model's output is not the output of a PyTorch module", hint="report this as a bug")
    return taps


def reshaped(wiring: Wiring, taps: Mapping[str, Point]) -> dict[str, tuple[int, ...]]:
    """The taps that the runtime has in another shape than PyTorch's, and that shape."""
    return {name: shape for name, shape in wiring.shapes.items() if name in taps and shape != taps[name].shape}


def segments_of(
    wiring: Wiring,
    taps: Mapping[str, Point],
    inputs: Iterable[str],
    rounding: Collection[str] = (),
    *,
    half: bool = False,
) -> tuple[Segment, ...]:
    """Cut a graph at its `taps`, in PyTorch's order, which is one that the graph can be computed in.

    Args:
        rounding: the modules that round what they read to 8 bits, which PyTorch's do not.
        half: the graph itself keeps float16 between operators.
    """
    usual = HALF_LAYER_TOLERANCE if half else LAYER_TOLERANCE
    known = set(inputs)
    makers = {tensor: node for node in wiring.nodes for tensor in node.outputs}
    found = []
    for node in wiring.nodes:
        for tensor in node.outputs:
            if tensor not in taps:
                continue
            feeds: dict[str, None] = {}
            nodes, open_ends = {id(node): node}, list(node.inputs)
            while open_ends:
                name = open_ends.pop()
                if name in taps or name in known:
                    feeds[name] = None
                elif name in makers and id(makers[name]) not in nodes:
                    nodes[id(makers[name])] = makers[name]
                    open_ends += makers[name].inputs
            point = taps[tensor]
            modules = [each.module for each in nodes.values() if each.module]
            owner = common_module(modules) if modules else point.module
            limit = usual if set(modules).isdisjoint(rounding) else ROUNDING_LAYER_TOLERANCE
            found.append(Segment(tensor, point.index, owner, point.kind, tuple(sorted(feeds)), limit.min_snr_db))
    return tuple(sorted(found, key=lambda segment: segment.point))
