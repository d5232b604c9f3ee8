"""What a layer's values look like, in memory that does not grow with them; and the range that 8 bits should cover.

Values stream through a histogram of fixed size, whose span doubles when a value falls outside: no tensor is kept.
Spans are powers of two, so that two histograms add up exactly.
"""

from __future__ import annotations

from math import frexp
from typing import Any, Final, Literal, cast

import numpy as np
from numpy.typing import NDArray

Method = Literal["minmax", "percentile", "mse", "entropy"]

BINS: Final = 4096  # of a histogram, symmetric around zero
PERCENT: Final = 99.999  # of values that "percentile" covers
_LEVELS: Final = 255  # steps of 8 bits
_CLIPS: Final = np.linspace(1.0, 0.2, 41)  # shares of the full range that "mse" tries
_ENTROPY_BINS: Final = (
    512  # ONNX Runtime's search takes a quarter of a second a tensor with 1024, and less than 0.1 with 512
)
_ENTROPY_LEVELS: Final = 128  # its default


class Histogram:
    """Counts of streamed values in `BINS` bins over [-span, span], and their exact extremes."""

    def __init__(self) -> None:
        self.span = 0.0
        self.low, self.high = np.inf, -np.inf
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)

    @property
    def is_empty(self) -> bool:
        return bool(self.low > self.high)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count `values`, of any shape.

        Raises:
            ValueError: one of them is NaN or infinite.
        """
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():  # a NaN is the least and the largest of whatever holds one
            raise ValueError("NaN or infinity")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(_power_of_two(max(abs(low), abs(high))))
        self.counts += np.histogram(values, BINS, (-self.span or -1.0, self.span or 1.0))[0]

    def merge(self, other: Histogram) -> None:
        """Add what `other` has counted, as if this one had seen it."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self._widen(other.span)
        counts, span = other.counts, other.span
        if span == 0.0:
            counts, span = self._at_zero(counts), self.span
        while span < self.span:
            counts, span = _doubled(counts), 2 * span
        self.counts += counts

    def _widen(self, span: float) -> None:
        if self.span == 0.0 and span > 0:
            self.counts, self.span = self._at_zero(self.counts), span
        while span > self.span > 0:
            self.counts, self.span = _doubled(self.counts), 2 * self.span

    @staticmethod
    def _at_zero(counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Zeros that were counted before there was a span: all in the bin that begins at zero."""
        moved = np.zeros_like(counts)
        moved[BINS // 2] = counts.sum()
        return moved

    def range(self, method: Method) -> tuple[float, float]:
        """Least and greatest value to represent, zero among them (padding is zero and must stay exact)."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if method == "minmax" or self.span == 0.0:
            return low, high
        edges = np.linspace(-self.span, self.span, BINS + 1)
        if method == "percentile":
            share = np.cumsum(self.counts) / self.counts.sum()
            tail = (1 - PERCENT / 100) / 2
            first, last = int(np.searchsorted(share, tail, "right")), int(np.searchsorted(share, 1 - tail))
            return max(low, min(float(edges[first]), 0.0)), min(high, max(float(edges[last + 1]), 0.0))
        if method == "entropy":
            least, most = _entropy_range(self.counts, edges, low, high)
            return max(low, min(least, 0.0)), min(high, max(most, 0.0))
        centres = (edges[:-1] + edges[1:]) / 2
        errors = [self._error(centres, low * clip, high * clip) for clip in _CLIPS]
        clip = float(_CLIPS[int(np.argmin(errors))])
        return low * clip, high * clip

    def _error(self, centres: NDArray[np.float64], low: float, high: float) -> float:
        """Sum of squared errors of 8 bits over [low, high]; within a bin, a step's own rounding counts as uniform."""
        step = (high - low) / _LEVELS
        outside = centres - np.clip(centres, low, high)
        return float((self.counts * (outside**2 + step**2 / 12)).sum())


def _power_of_two(peak: float) -> float:
    """The least power of two that is not below `peak`; 0 for 0."""
    if peak == 0.0:
        return 0.0
    fraction, exponent = frexp(peak)
    return float(2.0 ** (exponent - 1 if fraction == 0.5 else exponent))


def _doubled(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same counts over twice the span: two old bins make a new one, in the middle half."""
    wider = np.zeros_like(counts)
    wider[BINS // 4 : BINS // 4 * 3] = counts.reshape(-1, 2).sum(1)
    return wider


def _entropy_range(
    counts: NDArray[np.int64], edges: NDArray[np.float64], low: float, high: float
) -> tuple[float, float]:
    """The clipped range whose 8-bit histogram has the least Kullback-Leibler divergence from the values', by
    ONNX Runtime's own search ("8-bit inference with TensorRT", Migacz, 2017)."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    every = BINS // _ENTROPY_BINS
    coarse = counts.reshape(-1, every).sum(1), edges[::every], np.float64(low), np.float64(high)
    make = cast("Any", HistogramCollector)
    collector = make("entropy", False, _ENTROPY_BINS, _ENTROPY_LEVELS, None, "same")
    least, most = collector.get_entropy_threshold(coarse, _ENTROPY_LEVELS)
    return float(least), float(most)
