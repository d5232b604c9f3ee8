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


Reference = Callable[[int], Array]  # point -> PyTorch's tensor


def read_points(folder: Path) -> Reference:
    """Points as `trace` saved them; only what is looked at is read from the disk."""
    return lambda point: np.asarray(np.load(folder / f"{point:05}.npy", mmap_mode="r"))


def examine(
    session: TapSession,
    chunk: Sequence[Segment],
    *,
    inputs: Feeds,
    reference: Reference,
    full: Reference | None,
    own: Path,
    keep: Collection[str],
    at: Mapping[str, int],
    batchless: bool,
    flat: Collection[str],
) -> tuple[Layer, ...]:
    """Both passes over one chunk.

    Args:
        inputs: of the whole component, as the runtime takes them.
        reference: PyTorch with the model's own, rounded weights.
        full: PyTorch in float32, where that is something else.
        own: a folder in which the chunks before this one have left what the runtime computed itself.
        keep: the taps to leave there.
        at: tap -> point, of all chunks.
        batchless, flat: as in `Wiring`.
    """
    layers = {each.tensor: Layer(each.module, each.op, each.tensor, each.point) for each in chunk}
    names = list(layers)
    outside = {feed for segment in chunk for feed in segment.feeds} - set(names)

    def native(value: Array, name: str) -> Array:
        if name in flat:
            return value.reshape(-1, value.shape[-1], 1, 1)
        return value[0] if batchless and value.ndim else value

    given = {name: native(inputs[name], name) for name in outside if name in inputs}
    files = {name: own / f"{at[name]:05}.npy" for name in outside if name not in inputs}
    stored = {name: np.load(file) for name, file in files.items() if file.exists()}
    had = [each.tensor for each in chunk if not {feed for feed in each.feeds if feed in files} - stored.keys()]
    for name, value in session.run(given | stored, had):
        if name in keep:
            np.save(own / f"{at[name]:05}.npy", value)
        carried, _, _ = _measure(native(reference(at[name]), name), value)
        layers[name] = replace(layers[name], carried_db=carried)
    del stored
    inner = {feed for segment in chunk for feed in segment.feeds if feed not in inputs}

    def forced(source: Reference) -> Feeds:
        return given | {name: np.ascontiguousarray(native(source(at[name]), name)) for name in inner}

    for name, value in session.run(forced(reference), names):
        made, largest, problem = _measure(native(reference(at[name]), name), value)
        layers[name] = replace(layers[name], made_db=made, max_abs=largest, problem=problem)
    if full is not None:
        for name, value in session.run(forced(full), names):
            lost, _, _ = _measure(native(full(at[name]), name), value)
            layers[name] = replace(layers[name], lost_db=lost)
    return tuple(layers[name] for name in names)


def _measure(expected: Array, found: Array) -> tuple[float, float, str]:
    """SNR in dB, largest difference, and what is wrong where there is no number for it."""
    if not np.abs(expected).max(initial=0.0) > _QUIET and np.array_equal(expected, found):
        return finite_db(float("inf")), 0.0, ""
    try:
        parity = compare(expected, found, where="")
    except ParityError as error:
        return finite_db(float("-inf")), 0.0, error.what.removeprefix(": ")
    return finite_db(parity.snr_db), parity.max_abs, ""
