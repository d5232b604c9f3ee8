"""How far a runtime's tensor lies from PyTorch's. Every sum is taken in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ..runtimes.protocol import Array
from ..stages.errors import ModelError, ParityError

EXACT_DB: Final = 999.0
"""What JSON says for equal tensors, since it has no infinity. The nearest unequal float32 tensors stay below 300 dB."""

_BLOCK: Final = 2**20  # elements


@dataclass(frozen=True, slots=True)
class Parity:
    """The distance between two tensors, or the worst of several such distances.

    `max_abs` is in the tensor's own unit; the ratios are in dB and infinite for equal tensors.
    """

    max_abs: float
    snr_db: float
    psnr_db: float
    cosine: float

    def to_json(self) -> dict[str, float]:
        return {
            "max_abs": self.max_abs,
            "snr_db": finite_db(self.snr_db),
            "psnr_db": finite_db(self.psnr_db),
            "cosine": self.cosine,
        }


def compare(reference: Array, candidate: Array, *, peak: float | None = None, where: str = "output") -> Parity:
    """Measure how far `candidate` lies from `reference`.

    Args:
        reference: PyTorch's tensor, any shape, float.
        candidate: the runtime's tensor, same shape.
        peak: numerator of the PSNR; max|reference| when absent, 1.0 for pictures in 0..1.
        where: names the tensor in errors.
    Returns:
        `snr_db` = 10 log10(sum r^2 / sum (r - c)^2), `psnr_db` = 10 log10(peak^2 / mean (r - c)^2),
        `cosine` = r.c / (|r| |c|).
    Raises:
        ParityError: the shapes differ, or the candidate holds a NaN or an infinity.
        ModelError: the reference itself holds one: there is nothing to compare with.
    """
    if reference.shape != candidate.shape:
        raise ParityError(f"{where}: shape {candidate.shape} instead of PyTorch's {reference.shape}")
    if reference.size == 0:
        raise ModelError(f"{where}: PyTorch's tensor is empty, shape {reference.shape}")
    r, c = reference.reshape(-1), candidate.reshape(-1)
    if bad := _not_finite(r):
        raise ModelError(
            f"{where}: PyTorch itself gives {bad}",
            hint="the checkpoint's weights overflow; no conversion can mend them",
        )
    if bad := _not_finite(c):
        raise ParityError(f"{where}: the runtime gives {bad} where PyTorch is finite")
    noise = signal = other = product = furthest = largest = 0.0
    for x, y in zip(_blocks(r), _blocks(c), strict=True):
        apart = x - y
        noise += float(np.sum(apart**2))
        furthest = max(furthest, float(np.max(np.abs(apart))))
        largest = max(largest, float(np.max(np.abs(x))))
        signal, other, product = signal + _dot(x, x), other + _dot(y, y), product + _dot(x, y)
    return Parity(
        max_abs=furthest,
        snr_db=_decibel(signal, noise),
        psnr_db=_decibel((largest if peak is None else peak) ** 2, noise / r.size),
        cosine=_cosine(signal, other, product),
    )


def worst(parities: Sequence[Parity]) -> Parity:
    """The worst of each number; they need not stem from the same tensor."""
    if not parities:
        raise ValueError("the worst of nothing is unknown")
    return Parity(
        max_abs=max(p.max_abs for p in parities),
        snr_db=min(p.snr_db for p in parities),
        psnr_db=min(p.psnr_db for p in parities),
        cosine=min(p.cosine for p in parities),
    )


def finite_db(value: float) -> float:
    """`value` for JSON: infinities become plus or minus `EXACT_DB`."""
    return max(-EXACT_DB, min(EXACT_DB, value))


def _decibel(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def _dot(a: Array, b: Array) -> float:
    """Not `a @ b`: BLAS adds in an order that depends on the number of threads, and manifests hold the result."""
    return float(np.sum(a * b))


def _cosine(signal: float, other: float, product: float) -> float:
    """Of two tensors with these squared lengths and this product."""
    lengths = math.sqrt(signal) * math.sqrt(other)
    if lengths == 0.0:
        return 1.0 if signal == other else 0.0
    return min(1.0, product / lengths)


def _blocks(values: Array) -> Iterator[Array]:
    """`values` in float64, a part at a time: feature maps of 256 MiB would otherwise take gigabytes."""
    for start in range(0, values.size, _BLOCK):
        yield values[start : start + _BLOCK].astype(np.float64)


def _not_finite(values: Array) -> str:
    """Words for the NaNs and infinities in `values`; empty when there are none."""
    parts = range(0, values.size, _BLOCK)
    nans = sum(int(np.isnan(values[start : start + _BLOCK]).sum()) for start in parts)
    infinities = sum(int(np.isinf(values[start : start + _BLOCK]).sum()) for start in parts)
    return f"{nans} NaN and {infinities} infinite of {values.size} values" if nans or infinities else ""
