"""How the differences between two pictures are spread: a few wrong pixels, or a haze over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..runtimes.protocol import Array

LEVELS: Final = 255.0
"""Steps of an 8-bit channel; differences are counted in these."""

EDGES: Final = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, LEVELS)
"""Of the histogram, in levels. Half a level and less can only turn a rounding; what people see begins near 3."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A histogram of abs(reference - candidate) over all channel values of a picture."""

    counts: tuple[int, ...]  # between EDGES, each edge belonging to the bin above it, the last one to both
    changed: float  # share of channel values that differ once both are rounded to 8 bits, 0..1

    def to_json(self) -> dict[str, Any]:
        return {"edges_levels": list(EDGES), "counts": list(self.counts), "changed_share_8bit": self.changed}


def spread_of(reference: Array, candidate: Array) -> Spread:
    """Count the differences of two pictures of one shape, floats in 0..1."""
    levels = np.abs(reference.astype(np.float64) - candidate.astype(np.float64)) * LEVELS
    counts, _ = np.histogram(np.minimum(levels, LEVELS), np.array(EDGES))
    changed = np.rint(reference * LEVELS) != np.rint(candidate * LEVELS)
    return Spread(tuple(int(count) for count in counts), float(changed.mean()))
