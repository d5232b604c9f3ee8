"""Run a model segment by segment: what error does a module make, and what error has come with its inputs?

Two passes over the same tensors. *Carried*: every module reads what the runtime itself computed before, as in a real
run. *Made*: every module reads PyTorch's own inputs, so that what is wrong behind it is its own work.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from ...pipeline.errors import ParityError
from ...runtimes.protocol import Array, Feeds
from ...runtimes.taps import TapSession
from ..parity import compare, finite_db
from ..tolerances import LAYER_TOLERANCE
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
    return lambda point: np.asarray(np.load(folder / f"{point:05}.npy", mmap_mode="r"))


@dataclass(frozen=True)
class Subject:
    """The model that is examined, and how its tensors are PyTorch's."""

    session: TapSession
    inputs: Feeds  # of the whole component, as the runtime takes them
    at: Mapping[str, int]  # tap -> point, of the whole component
    batchless: bool  # as in `Wiring`
    flat: Collection[str]  # as in `Wiring`

    def native(self, reference: Reference, name: str) -> Array:
        """PyTorch's tensor, laid out as the runtime has it."""
        return self.laid_out(reference(self.at[name]), name)

    def laid_out(self, value: Array, name: str) -> Array:
        if name in self.flat:
            return value.reshape(-1, value.shape[-1], 1, 1)
        return value[0] if self.batchless and value.ndim else value

    def given(self, names: Collection[str]) -> dict[str, Array]:
        """Those of `names` that are inputs of the component."""
        return {name: self.laid_out(self.inputs[name], name) for name in names if name in self.inputs}


def examine(
    subject: Subject,
    chunk: Sequence[Segment],
    *,
    reference: Reference,
    full: Reference | None,
    own: Path,
    keep: Collection[str],
) -> tuple[Layer, ...]:
    """All passes over one chunk.

    Args:
        reference: PyTorch with the model's own, rounded weights.
        full: PyTorch in float32, where that is something else.
        own: a folder in which the chunks before this one have left what the runtime computed itself.
        keep: the taps to leave there.
    """
    carried = _carry(subject, chunk, reference, own, keep)
    layers = force(subject, chunk, reference)
    lost = {layer.tensor: layer.made_db for layer in force(subject, chunk, full)} if full is not None else {}
    return tuple(
        replace(layer, carried_db=carried.get(layer.tensor), lost_db=lost.get(layer.tensor)) for layer in layers
    )


def force(subject: Subject, chunk: Sequence[Segment], reference: Reference) -> tuple[Layer, ...]:
    """Every module fed with PyTorch's inputs, against what PyTorch makes of them."""
    layers = {each.tensor: _layer(each) for each in chunk}
    read = {feed for segment in chunk for feed in segment.feeds}
    inner = {name: np.ascontiguousarray(subject.native(reference, name)) for name in read if name not in subject.inputs}
    for name, value in subject.session.run(subject.given(read) | inner, list(layers)):
        made, largest, problem = _measure(subject.native(reference, name), value)
        layers[name] = replace(layers[name], made_db=made, max_abs=largest, problem=problem)
    return tuple(layers.values())


def _layer(segment: Segment) -> Layer:
    return Layer(segment.module, segment.op, segment.tensor, segment.point, needed_db=segment.needed_db)


def _carry(
    subject: Subject, chunk: Sequence[Segment], reference: Reference, own: Path, keep: Collection[str]
) -> dict[str, float]:
    """Tap -> SNR in dB of a run that goes on from what earlier chunks have left in `own`.

    It leaves there what `keep` names. A tensor that starts from one which can only be fed is left out.
    """
    made = {segment.tensor for segment in chunk}
    outside = {feed for segment in chunk for feed in segment.feeds} - made
    files = {name: own / f"{subject.at[name]:05}.npy" for name in outside if name not in subject.inputs}
    stored = {name: np.load(file) for name, file in files.items() if file.exists()}
    lacking = files.keys() - stored.keys()
    had = [segment.tensor for segment in chunk if not lacking & set(segment.feeds)]
    carried = {}
    for name, value in subject.session.run(subject.given(outside) | stored, had):
        if name in keep:
            np.save(own / f"{subject.at[name]:05}.npy", value)
        carried[name], _, _ = _measure(subject.native(reference, name), value)
    return carried


def _measure(expected: Array, found: Array) -> tuple[float, float, str]:
    """SNR in dB, largest difference, and what is wrong where there is no number for it."""
    if not np.abs(expected).max(initial=0.0) > _QUIET and np.array_equal(expected, found):
        return finite_db(float("inf")), 0.0, ""
    try:
        parity = compare(expected, found, where="")
    except ParityError as error:
        return finite_db(float("-inf")), 0.0, error.what.removeprefix(": ")
    return finite_db(parity.snr_db), parity.max_abs, ""
