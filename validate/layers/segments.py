"""A runtime's graph, cut where its tensors are PyTorch's: each segment is the work of one module."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from ...pipeline.errors import ModelError
from ...runtimes.taps import Wiring, common_module
from ..tolerances import LAYER_TOLERANCE, ROUNDING_LAYER_TOLERANCE
from .points import Point

MOST_RUNS: Final = 25
"""Partial runs of a component, at most, however many modules it has."""

_LEAST_BYTES: Final = 2**24
_FLOAT: Final = 4  # bytes


@dataclass(frozen=True, slots=True)
class Segment:
    """The nodes between the taps before a tap and the tap."""

    tensor: str  # the tap, by the runtime's name
    point: int  # the same tensor in PyTorch
    bytes: int
    module: str  # whose work it is: the innermost module that holds every node of the segment
    op: str  # PyTorch's class of the module that makes the tensor
    feeds: tuple[str, ...]  # taps before it, and inputs of the component
    needed_db: float = LAYER_TOLERANCE.min_snr_db  # that the work must reach


def taps_of(wiring: Wiring, points: Sequence[Point]) -> dict[str, Point]:
    """Tensor -> the point that it is.

    A tap that stands for several points is the first of them: others are the same values (what PyTorch computes twice
    and the exporter once), or come from it by work that is done later in the runtime.

    Raises:
        ModelError: the component's output is no tap, so its graph and PyTorch's modules do not belong together.
    """
    at = {key: point for point in points for key in point.keys}
    taps: dict[str, Point] = {}
    for tensor, keys in wiring.keys.items():
        if same := [at[key] for key in keys if key in at]:
            taps[tensor] = min(same, key=lambda point: point.index)
    if not any(":out" in wiring.keys[tensor] for tensor in taps):
        raise ModelError("the output of the model is none of PyTorch's modules'", hint="report this as a bug")
    return taps


def segments_of(
    wiring: Wiring, taps: Mapping[str, Point], inputs: Iterable[str], rounding: Collection[str] = ()
) -> tuple[Segment, ...]:
    """Cut a graph at its `taps`, in PyTorch's order, which is one that the graph can be computed in.

    Args:
        rounding: the modules that round what they read to 8 bits, which PyTorch's do not.
    """
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
            limit = LAYER_TOLERANCE if set(modules).isdisjoint(rounding) else ROUNDING_LAYER_TOLERANCE
            size = _FLOAT * prod(point.shape)
            found.append(Segment(tensor, point.index, size, owner, point.kind, tuple(sorted(feeds)), limit.min_snr_db))
    return tuple(sorted(found, key=lambda segment: segment.point))


def chunks_of(segments: Sequence[Segment], most: int) -> tuple[tuple[Segment, ...], ...]:
    """Split into at most `most` runs of neighbours of nearly equal bytes: what is held in memory at once."""
    low, high = _LEAST_BYTES, max(_LEAST_BYTES, sum(segment.bytes for segment in segments))
    while low < high:
        middle = (low + high) // 2
        if len(_greedy(segments, middle)) <= most:
            high = middle
        else:
            low = middle + 1
    return _greedy(segments, high)


def _greedy(segments: Sequence[Segment], most_bytes: int) -> tuple[tuple[Segment, ...], ...]:
    chunks: list[list[Segment]] = []
    size = 0
    for segment in segments:
        if not chunks or size + segment.bytes > most_bytes:
            chunks.append([])
            size = 0
        chunks[-1].append(segment)
        size += segment.bytes
    return tuple(map(tuple, chunks))


def needed_later(chunks: Sequence[Sequence[Segment]]) -> tuple[frozenset[str], ...]:
    """For each chunk, the taps in it that a later chunk starts from."""
    wanted: set[str] = set()
    kept = []
    for chunk in reversed(chunks):
        made = {segment.tensor for segment in chunk}
        kept.append(frozenset(made & wanted))
        wanted |= {feed for segment in chunk for feed in segment.feeds}
    return tuple(reversed(kept))


def points_of(chunk: Iterable[Segment], at: Mapping[str, int]) -> set[int]:
    """The points that a chunk is compared with or fed with; `at` maps taps to points."""
    return {at[name] for segment in chunk for name in (segment.tensor, *segment.feeds) if name in at}
