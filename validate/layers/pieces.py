"""Which segments a runtime computes together: few partial runs, and little in memory in each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from .segments import Segment

MOST_RUNS: Final = 25
"""Partial runs of a component, at most, however many modules it has."""

_LEAST_BYTES: Final = 2**25  # of a piece: smaller models are not divided further


@dataclass(frozen=True, slots=True)
class Piece:
    """What one partial run computes."""

    segments: tuple[Segment, ...]
    carried: bool  # it goes on from what the runtime itself made before, else every segment reads PyTorch's tensors
    keep: frozenset[str] = frozenset()  # if carried: the taps in it that later pieces start from

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(segment.tensor for segment in self.segments)

    @property
    def feeds(self) -> frozenset[str]:
        """The tensors that stand in for all that comes before."""
        read = {feed for segment in self.segments for feed in segment.feeds}
        return frozenset(read - set(self.tensors) if self.carried else read)

    def points(self, at: Mapping[str, int]) -> set[int]:
        """The points that it is compared with, or fed with; `at` maps taps to points."""
        return {at[name] for name in (*self.tensors, *(() if self.carried else self.feeds)) if name in at}

    @property
    def last(self) -> int:
        """Of the points that it makes."""
        return max(segment.point for segment in self.segments)


def pieces_of(
    segments: Sequence[Segment],
    size: Mapping[str, int],
    *,
    forced: int = 1,
    streamed: bool = False,
    most: int = MOST_RUNS,
) -> tuple[Piece, ...]:
    """All of `segments` twice, carried and fed, in `most` partial runs that hold as few bytes as can be.

    What a run holds is what it is fed with and what it makes, so that a carried piece may be about twice as long as
    one of which every segment is fed.

    Args:
        segments: in an order in which they can be computed.
        size: bytes of each tap.
        forced: how often a fed piece is run, on different values.
        streamed: whether what a run is fed with takes no memory.
    Returns:
        The pieces, ordered by the last point that each makes, so that neighbours need the same points; carried ones
        come in an order in which they can be computed.
    """

    fed_size = {} if streamed else size

    def divided(limit: int) -> tuple[list[Piece], list[Piece]]:
        carried, fed = (_divide(segments, _Growing(size, fed_size, limit, carried=each)) for each in (True, False))
        return carried, fed

    def runs(limit: int) -> int:
        carried, fed = divided(limit)
        return len(carried) + forced * len(fed)

    low, high = _LEAST_BYTES, max(_LEAST_BYTES, 2 * sum(size.get(segment.tensor, 0) for segment in segments))
    while low < high:
        middle = (low + high) // 2
        if runs(middle) <= most:
            high = middle
        else:
            low = middle + 1
    carried, fed = divided(high)
    return tuple(sorted((*_with_keeps(carried), *fed), key=lambda piece: piece.last))


def _divide(segments: Sequence[Segment], first: _Growing) -> list[Piece]:
    """Neighbours together, as long as a piece takes them; `first` is an empty one, of the kind that is wanted."""
    pieces = [first]
    for segment in segments:
        if not pieces[-1].takes(segment):
            pieces.append(_Growing(first.made_size, first.fed_size, first.limit, first.carried))
        pieces[-1].add(segment)
    return [Piece(tuple(piece.segments), piece.carried) for piece in pieces]


@dataclass
class _Growing:
    """A piece in the making."""

    made_size: Mapping[str, int]
    fed_size: Mapping[str, int]
    limit: int  # bytes that it may hold, one segment aside
    carried: bool
    segments: list[Segment] = field(default_factory=list)
    made: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    bytes: int = 0  # of what it is fed with and what it makes

    def takes(self, segment: Segment) -> bool:
        return not self.segments or self.bytes + self._more(segment) <= self.limit

    def add(self, segment: Segment) -> None:
        self.bytes += self._more(segment)
        self.read |= self._fed(segment)
        self.made.add(segment.tensor)
        self.segments.append(segment)

    def _more(self, segment: Segment) -> int:
        return self.made_size.get(segment.tensor, 0) + sum(self.fed_size.get(name, 0) for name in self._fed(segment))

    def _fed(self, segment: Segment) -> set[str]:
        """What it reads that the piece does not have yet."""
        return set(segment.feeds) - self.read - (self.made if self.carried else set())


def _with_keeps(carried: Sequence[Piece]) -> list[Piece]:
    """Carried pieces that know what later ones start from."""
    wanted: set[str] = set()
    kept = []
    for piece in reversed(carried):
        kept.append(replace(piece, keep=frozenset(wanted & set(piece.tensors))))
        wanted |= piece.feeds
    return kept[::-1]


def groups_of(
    pieces: Iterable[Piece], points: Callable[[Piece], set[int]], size: Sequence[int], most: int
) -> list[tuple[Piece, ...]]:
    """Split `pieces` where the points of neighbours would take more than `most` bytes together.

    Args:
        size: bytes of each point.
    """
    groups: list[list[Piece]] = []
    held: set[int] = set()
    for piece in pieces:
        held |= (needed := points(piece))
        if not groups or sum(size[point] for point in held) > most:
            groups.append([])
            held = needed
        groups[-1].append(piece)
    return [tuple(group) for group in groups]
