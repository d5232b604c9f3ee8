"""Run a model piece by piece: what error does a module make, and what error has come with its inputs?

Two passes over the same tensors. *Carried*: every module reads what the runtime itself computed before, as in a real
run. *Made*: every module reads PyTorch's own inputs, so that what is wrong behind it is its own work.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from ...runtimes.protocol import Array, Feeds
from ...runtimes.taps import TapSession
from ...stages.errors import ParityError
from ..parity import compare, finite_db
from ..tolerances import LAYER_TOLERANCE
from .pieces import Piece
from .segments import Segment

_QUIET: Final = 1e-30  # an output of nothing but zeros


@dataclass(frozen=True, slots=True)
class Layer:
    """One module's work. Ratios are in dB, +-999 for equal and for not comparable tensors."""

    module: str
    op: str
    tensor: str  # the runtime's name of what it makes
    point: int
    made_db: float = 0.0  # fed with PyTorch's inputs
    carried_db: float | None = None  # in the course of a whole run, where the runtime makes it in one
    max_abs: float = 0.0  # of what it makes, in the tensor's unit
    lost_db: float | None = None  # fed with float32 PyTorch's inputs: what fewer bits cost; None at fp32
    problem: str = ""  # NaN, another shape
    needed_db: float = LAYER_TOLERANCE.min_snr_db  # that `made_db` must reach

    @property
    def ok(self) -> bool:
        return self.made_db >= self.needed_db


Reference = Callable[[int], Array]  # point -> PyTorch's tensor


def read_points(folder: Path) -> Reference:
    """Points as `trace` saved them; only what is looked at is read from the disk."""
    return lambda point: _mapped(folder / f"{point:05}.npy")


def _mapped(file: Path) -> Array:
    return np.asarray(np.load(file, mmap_mode="r"))


@dataclass(frozen=True)
class Subject:
    """The model that is examined, and how its tensors are PyTorch's."""

    session: TapSession
    inputs: Feeds  # of the whole component, as the runtime takes them
    at: Mapping[str, int]  # tap -> point, of the whole component
    batchless: bool  # as in `Wiring`
    flat: Collection[str]  # as in `Wiring`
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # `reshaped`

    def native(self, reference: Reference, name: str) -> Array:
        """PyTorch's tensor, laid out as the runtime has it."""
        return self.laid_out(reference(self.at[name]), name)

    def laid_out(self, value: Array, name: str) -> Array:
        if name in self.shapes:
            return value.reshape(self.shapes[name])
        if name in self.flat:
            return value.reshape(-1, value.shape[-1], 1, 1)
        return value[0] if self.batchless and value.ndim else value

    def feed(self, reference: Reference, name: str) -> Array:
        """An input of the component, or PyTorch's tensor."""
        return self.given(name) if name in self.inputs else np.ascontiguousarray(self.native(reference, name))

    def sizes(self, reference: Reference, names: Iterable[str]) -> dict[str, int]:
        """Bytes of some taps, as PyTorch has them."""
        return {name: reference(self.at[name]).nbytes for name in names}

    def given(self, name: str) -> Array:
        """An input of the component."""
        return self.laid_out(self.inputs[name], name)


@dataclass(frozen=True, slots=True)
class Findings:
    """What the partial runs over some pieces gave. Each pass may see a tensor in another piece."""

    made: tuple[Layer, ...] = ()
    carried: Mapping[str, float] = field(default_factory=dict)  # tensor -> SNR in dB
    lost: Mapping[str, float] = field(default_factory=dict)


def examine(
    subject: Subject, pieces: Iterable[Piece], *, reference: Reference, full: Reference | None, own: Path
) -> Findings:
    """Run `pieces`, one after the other.

    Args:
        reference: PyTorch with the model's own, rounded weights.
        full: PyTorch in float32, where that is something else.
        own: a folder in which the carried pieces before these have left what the runtime computed itself.
    """
    made: list[Layer] = []
    carried: dict[str, float] = {}
    lost: dict[str, float] = {}
    for piece in pieces:
        if piece.carried:
            carried |= carry(subject, piece, reference, own)
            continue
        made += force(subject, piece, reference)
        if full is not None:
            lost |= {layer.tensor: layer.made_db for layer in force(subject, piece, full)}
    return Findings(tuple(made), carried, lost)


def layers_of(segments: Iterable[Segment], found: Iterable[Findings]) -> tuple[Layer, ...]:
    """One row a segment, in their order, of all that was found."""
    made: dict[str, Layer] = {}
    carried: dict[str, float] = {}
    lost: dict[str, float] = {}
    for each in found:
        made |= {layer.tensor: layer for layer in each.made}
        carried |= each.carried
        lost |= each.lost
    rows = (made[segment.tensor] for segment in segments)
    return tuple(replace(row, carried_db=carried.get(row.tensor), lost_db=lost.get(row.tensor)) for row in rows)


def force(subject: Subject, piece: Piece, reference: Reference) -> tuple[Layer, ...]:
    """Every module fed with PyTorch's inputs, against what PyTorch makes of them."""
    layers = {each.tensor: _layer(each) for each in piece.segments}
    feeds = _Read(piece.feeds, partial(subject.feed, reference))
    for name, value in subject.session.run(feeds, subject.sizes(reference, piece.tensors)):
        made, largest, problem = _measure(subject.native(reference, name), value)
        del value  # or it would be held while the next one is computed
        layers[name] = replace(layers[name], made_db=made, max_abs=largest, problem=problem)
    return tuple(layers.values())


def _layer(segment: Segment) -> Layer:
    return Layer(segment.module, segment.op, segment.tensor, segment.point, needed_db=segment.needed_db)


def carry(subject: Subject, piece: Piece, reference: Reference, own: Path) -> dict[str, float]:
    """Tap -> SNR in dB of a run that goes on from what earlier pieces have left in `own`.

    It leaves there what later ones start from. A tensor that starts from one which can only be fed is left out.
    """

    def stored(name: str) -> Path:
        return own / f"{subject.at[name]:05}.npy"

    def feed(name: str) -> Array:
        return subject.given(name) if name in subject.inputs else _mapped(stored(name))

    lacking = {name for name in piece.feeds if name not in subject.inputs and not stored(name).exists()}
    had = [segment.tensor for segment in piece.segments if not lacking & set(segment.feeds)]
    if not had:
        return {}
    carried = {}
    for name, value in subject.session.run(_Read(piece.feeds - lacking, feed), subject.sizes(reference, had)):
        if name in piece.keep:
            np.save(stored(name), value)
        carried[name], _, _ = _measure(subject.native(reference, name), value)
        del value  # as in `force`
    return carried


class _Read(Mapping[str, Array]):
    """Feeds that are read from the disk each time that somebody asks: they may be larger than the model together."""

    def __init__(self, names: Collection[str], read: Callable[[str], Array]) -> None:
        self._names = frozenset(names)
        self._read = read

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def _measure(expected: Array, found: Array) -> tuple[float, float, str]:
    """SNR in dB, largest difference, and what is wrong where there is no number for it."""
    largest = max(float(expected.max(initial=0.0)), -float(expected.min(initial=0.0)))  # np.abs would make a copy
    if not largest > _QUIET and np.array_equal(expected, found):
        return finite_db(float("inf")), 0.0, ""
    try:
        parity = compare(expected, found, where="")
    except ParityError as error:
        return finite_db(float("-inf")), 0.0, error.what.removeprefix(": ")
    return finite_db(parity.snr_db), parity.max_abs, ""
