"""Ranges of what enters each layer along real trajectories: what activations at 8 bits need to be scaled by.

Values stream through a histogram of fixed size a layer, whose span doubles when a value falls outside: no tensor is
kept. Peers that add every activation as an output of the graph were seen at hundreds of gigabytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ..pipeline.artifacts import ComponentSource
from ..pipeline.errors import ModelError
from .samples import Samples

Method = Literal["minmax", "percentile", "mse"]

_BINS: Final = 2048  # of a histogram, symmetric around zero
_PERCENT: Final = 99.99  # of values that "percentile" covers
_LEVELS: Final = 255  # steps of 8 bits
_CLIPS: Final = np.linspace(1.0, 0.2, 41)  # shares of the full range that "mse" tries
_FILE: Final = "ranges.json"


class Histogram:
    """Counts of streamed values in `_BINS` bins over [-span, span], and their exact extremes."""

    def __init__(self) -> None:
        self.span = 0.0
        self.low, self.high = np.inf, -np.inf
        self.counts: NDArray[np.int64] = np.zeros(_BINS, np.int64)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count finite `values`, of any shape."""
        low, high = float(values.min()), float(values.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        peak = max(abs(low), abs(high))
        if self.span == 0.0 and peak > 0:
            self.span = peak
        while peak > self.span > 0:
            # twice the span: two old bins make a new one, in the middle half
            half = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.zeros(_BINS, np.int64)
            self.counts[_BINS // 4 : _BINS // 4 * 3] = half
            self.span *= 2
        self.counts += np.histogram(values, _BINS, (-self.span or -1.0, self.span or 1.0))[0]

    def range(self, method: Method) -> tuple[float, float]:
        """Least and greatest value to represent, zero among them (padding is zero and must stay exact)."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if method == "minmax" or self.span == 0.0:
            return low, high
        edges = np.linspace(-self.span, self.span, _BINS + 1)
        if method == "percentile":
            share = np.cumsum(self.counts) / self.counts.sum()
            tail = (1 - _PERCENT / 100) / 2
            first, last = int(np.searchsorted(share, tail, "right")), int(np.searchsorted(share, 1 - tail))
            return max(low, min(float(edges[first]), 0.0)), min(high, max(float(edges[last + 1]), 0.0))
        centres = (edges[:-1] + edges[1:]) / 2
        errors = [self._error(centres, low * clip, high * clip) for clip in _CLIPS]
        clip = float(_CLIPS[int(np.argmin(errors))])
        return low * clip, high * clip

    def _error(self, centres: NDArray[np.float64], low: float, high: float) -> float:
        """Sum of squared errors of 8 bits over [low, high]; within a bin, a step's own rounding counts as uniform."""
        step = (high - low) / _LEVELS
        outside = centres - np.clip(centres, low, high)
        return float((self.counts * (outside**2 + step**2 / 12)).sum())


@dataclass(frozen=True, slots=True)
class InputRanges:
    """`ranges.json`: module path -> method -> [low, high], and `timesteps`: timestep -> [low, high]."""

    folder: Path
    component: str
    digest: str = ""

    def read(self, method: Method = "mse") -> dict[str, tuple[float, float]]:
        """Module path -> range of its input."""
        return {path: (entry[method][0], entry[method][1]) for path, entry in self._entries().items()}

    def by_timestep(self) -> dict[str, dict[float, tuple[float, float]]]:
        """Module path -> timestep -> extremes there; empty for components that have no timestep."""
        return {
            path: {float(t): (low, high) for t, (low, high) in entry["timesteps"].items()}
            for path, entry in self._entries().items()
        }

    def _entries(self) -> Mapping[str, Any]:
        entries: Mapping[str, Any] = json.loads((self.folder / _FILE).read_bytes())
        return entries


@dataclass(frozen=True)
class ObserveInputs:
    """Run a component along its samples and note the ranges of every linear layer's and convolution's input."""

    source: ComponentSource
    samples: Samples

    name: ClassVar[str] = "observe"
    version: ClassVar[int] = 1
    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "numpy")
    output: ClassVar[type] = InputRanges

    def key(self) -> Mapping[str, object]:
        return {
            "component": self.source.component,
            "source": self.source.digest,
            "samples": self.samples.digest,
        }

    def run(self, into: Path) -> InputRanges:
        import torch

        from ..export import modules
        from .calibrated import bare
        from .moments import run_once, watched, weighted_modules

        wrapped = modules.load(self.source)
        layers = weighted_modules(bare(wrapped))
        seen = {path: Histogram() for path in layers}
        steps: dict[str, dict[float, tuple[float, float]]] = {path: {} for path in layers}
        now: list[float] = []

        def see(path: str, layer: Any, x: Any) -> None:
            values = x.detach().numpy()
            if not np.isfinite(values).all():
                raise ModelError(f"{self.source.component}/{path} is fed NaN or infinity along calibration samples")
            seen[path].add(values)
            for t in now:
                low, high = steps[path].get(t, (np.inf, -np.inf))
                steps[path][t] = min(low, float(values.min())), max(high, float(values.max()))

        with torch.no_grad(), watched(layers, see):
            for feeds in self.samples.feeds(self.source.component):
                now[:] = [float(feeds["timestep"])] if "timestep" in feeds else []
                run_once(wrapped, feeds)
        methods: tuple[Method, ...] = ("minmax", "percentile", "mse")
        entries = {
            path: {
                **{method: list(seen[path].range(method)) for method in methods},
                "timesteps": {f"{t:g}": list(extremes) for t, extremes in sorted(steps[path].items())},
            }
            for path in layers
            if np.isfinite(seen[path].low)  # a layer that nothing runs through has no range
        }
        (into / _FILE).write_text(json.dumps(entries, indent=1) + "\n")
        return InputRanges(into, self.source.component)
