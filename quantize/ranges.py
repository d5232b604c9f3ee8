"""Ranges of what enters and leaves each layer along real trajectories: what activations of 8 bits are scaled by.

Peers that add every activation as an output of the graph were seen at hundreds of gigabytes; here values stream into
histograms. A stage observes the samples of a few prompts, so that an interrupted calibration goes on with the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..stages.artifacts import ComponentSource
from ..stages.errors import ModelError
from ..stages.stage import Runner, Stage
from .histogram import Histogram, Method
from .layer_ranges import FILE, LayerRanges, Range, Side
from .samples import Samples

_HISTOGRAMS: Final = "histograms.npz"
_STEPS: Final = "timesteps.json"


@dataclass(frozen=True, slots=True)
class ObservedInputs:
    """`histograms.npz`: of each layer's input, and of convolutions' outputs; `timesteps.json`: extremes by timestep."""

    folder: Path
    component: str
    digest: str = ""

    def histograms(self) -> dict[str, Histogram]:
        """`input:MODULE` or `output:MODULE` -> its histogram."""
        found = {}
        with np.load(self.folder / _HISTOGRAMS, allow_pickle=False) as stored:
            names = [str(name) for name in stored["names"]]
            for name, counts, (span, low, high) in zip(names, stored["counts"], stored["spans"], strict=True):
                histogram = Histogram()
                histogram.counts, histogram.span = counts, float(span)
                histogram.low, histogram.high = float(low), float(high)
                found[name] = histogram
        return found

    def by_timestep(self) -> dict[str, dict[float, Range]]:
        """Module path -> timestep -> extremes of its input there; empty for components that have no timestep."""
        stored = json.loads((self.folder / _STEPS).read_bytes())
        return {path: {float(t): (low, high) for t, (low, high) in steps.items()} for path, steps in stored.items()}


@dataclass(frozen=True)
class ObserveInputs(
    Stage[ObservedInputs],
    name="observe",
    version=2,
    tools=("torch", "diffusers", "transformers", "numpy"),
    aside=("form",),
):
    """Run a component along its samples and count what enters every linear layer and convolution."""

    source: ComponentSource
    samples: Samples
    form: str = ""  # which part of the samples of how many, for people

    def run(self, into: Path) -> ObservedInputs:
        import torch
        from torch import nn

        from ..export import modules
        from .calibrated import bare
        from .moments import run_once, watched, weighted_modules

        wrapped = modules.load(self.source)
        layers = weighted_modules(bare(wrapped))
        seen: dict[str, Histogram] = {}
        steps: dict[str, dict[float, Range]] = {}
        now: list[float] = []

        def count(side: Side, path: str, x: Any) -> None:
            values = x.detach().numpy()
            try:
                seen.setdefault(f"{side}:{path}", Histogram()).add(values)
            except ValueError as error:
                raise ModelError(
                    f"{self.source.component}/{path} meets {error} at its {side} along calibration samples",
                    hint="the checkpoint's weights are damaged or overflow; no conversion can mend them",
                ) from None
            if side == "input":
                for t in now:
                    low, high = steps.setdefault(path, {}).get(t, (np.inf, -np.inf))
                    steps[path][t] = min(low, float(values.min())), max(high, float(values.max()))

        def after(path: str) -> Any:
            return lambda layer, inputs, output: count("output", path, output)

        convolutions = {path: layer for path, layer in layers.items() if isinstance(layer, nn.Conv2d)}
        handles = [layer.register_forward_hook(after(path)) for path, layer in convolutions.items()]
        with torch.no_grad(), watched(layers, lambda path, layer, x: count("input", path, x)):
            for feeds in self.samples.feeds(self.source.component):
                now[:] = [float(feeds["timestep"])] if "timestep" in feeds else []
                run_once(wrapped, feeds)
        for handle in handles:
            handle.remove()
        np.savez_compressed(
            into / _HISTOGRAMS,
            allow_pickle=False,
            names=np.array(list(seen)),
            counts=np.array([each.counts for each in seen.values()]),
            spans=np.array([[each.span, each.low, each.high] for each in seen.values()]),
        )
        (into / _STEPS).write_text(json.dumps({p: {f"{t:g}": e for t, e in s.items()} for p, s in steps.items()}))
        return ObservedInputs(into, self.source.component)


@dataclass(frozen=True)
class ChooseRanges(Stage[LayerRanges], name="ranges", version=1, tools=("numpy", "onnxruntime")):
    """One range for every layer's input and every convolution's output, from all that was observed."""

    component: str
    observed: tuple[ObservedInputs, ...]
    method: Method

    def run(self, into: Path) -> LayerRanges:
        entries: dict[str, dict[str, list[float]]] = {}
        for name, histogram in merged_histograms(self.observed).items():
            side, _, path = name.partition(":")
            entries.setdefault(path, {})[side] = list(histogram.range(self.method))
        (into / FILE).write_text(json.dumps(entries, indent=1) + "\n")
        return LayerRanges(into, self.component, self.method)


def merged_histograms(observed: Iterable[ObservedInputs]) -> dict[str, Histogram]:
    """What all of `observed` saw, added up."""
    merged: dict[str, Histogram] = {}
    for each in observed:
        for name, histogram in each.histograms().items():
            merged.setdefault(name, Histogram()).merge(histogram)
    return merged


def layer_ranges(source: ComponentSource, samples: Samples, method: Method, run: Runner) -> LayerRanges:
    """The ranges of a component's layers along `samples`, from the cache or fresh; a stage a folder of samples."""
    parts = samples.by_folder(source.component)
    observed = tuple(
        run(ObserveInputs(source, part, form=f"{number}/{len(parts)}" if len(parts) > 1 else ""))
        for number, part in enumerate(parts, start=1)
    )
    return run(ChooseRanges(source.component, observed, method))
