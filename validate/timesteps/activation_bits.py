"""How many of 8 bits a layer's input really uses at each timestep, once one range has to serve all of them.

A static range is chosen for the whole trajectory, so a timestep at which a layer's input is narrow is rounded coarsely.
Ranges that are taken as they come use all bits at every timestep; for them this says what one range would leave.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

Range = tuple[float, float]

BITS: Final = 8
_CODES: Final = 2**BITS - 1


@dataclass(frozen=True, slots=True)
class BitsAtTimestep:
    """All layers at one timestep."""

    timestep: float
    median_bits: float
    least_bits: float
    least_layer: str  # who has the least
    clipped: int  # layers whose extremes lie outside of their range by more than a code

    def to_json(self) -> dict[str, Any]:
        return {
            "timestep": self.timestep,
            "median_bits": self.median_bits,
            "least_bits": self.least_bits,
            "least_layer": self.least_layer,
            "clipped_layers": self.clipped,
        }


@dataclass(frozen=True, slots=True)
class ActivationBits:
    """From the noisiest timestep to the last."""

    way: str  # "static": against the calibrated ranges; "dynamic": against the widest along the trajectory
    layers: int
    points: tuple[BitsAtTimestep, ...]

    def to_json(self) -> dict[str, Any]:
        return {"way": self.way, "layers": self.layers, "points": [point.to_json() for point in self.points]}


def activation_bits(
    seen: Mapping[str, Mapping[float, Range]], calibrated: Mapping[str, Range] | None
) -> ActivationBits | None:
    """8 + log2(width at the timestep / width of the range), at most 8; a range always includes zero.

    Args:
        seen: layer -> timestep -> extremes of its input.
        calibrated: layer -> the range that is used at every timestep; None: each tensor's own.
    Returns:
        None where nothing was seen.
    """
    ranges = calibrated
    if ranges is None:
        ranges = {
            layer: (min(low for low, _ in steps.values()), max(high for _, high in steps.values()))
            for layer, steps in seen.items()
        }
    found: dict[float, list[tuple[float, str, bool]]] = {}
    layers = [layer for layer in seen if layer in ranges]
    for layer in layers:
        low, high = _with_zero(ranges[layer])
        width = high - low
        for t, extremes in seen[layer].items():
            least, most = _with_zero(extremes)
            code = width / _CODES
            clipped = least < low - code or most > high + code
            used = min(most, high) - max(least, low)
            bits = BITS + math.log2(used / width) if used > 0 else 0.0  # a tensor of zeros needs none
            found.setdefault(t, []).append((max(0.0, bits), layer, clipped))
    if not found:
        return None
    points = []
    for t, entries in sorted(found.items(), reverse=True):
        least_bits, least_layer, _ = min(entries)
        middle = median(bits for bits, _, _ in entries)
        points.append(BitsAtTimestep(t, middle, least_bits, least_layer, sum(clipped for _, _, clipped in entries)))
    return ActivationBits("dynamic" if calibrated is None else "static", len(layers), tuple(points))


def _with_zero(extremes: Range) -> Range:
    return min(extremes[0], 0.0), max(extremes[1], 0.0)
