"""What does not fit float16: found before anything is written, and kept in float32 alone.

float16 ends at 65504 (IEEE 754 binary16). A weight beyond it would be stored as infinity, and one
far below its least normal number, 2^-14, as next to nothing. An activation beyond it
becomes infinity only where a runtime computes in float16, as phones' GPUs and ARM CPUs do: pictures turn black.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Final

import numpy as np

from ..checkpoints.weights import Weights
from ..stages.artifacts import ComponentSource
from ..stages.errors import ModelError
from ..stages.stage import Stage
from .cast import FLOAT16_MAX
from .plan import Plan, Shapes
from .scheme import KEEP

ACTIVATION_LIMIT: Final = FLOAT16_MAX / 4
"""Largest activation along the gate's trajectories that counts as safe: other prompts, seeds and sizes reach further,
and sums inside an operator pass above what it puts out. Two bits of room are a choice, not a measurement."""

FLOAT16_NORMAL: Final = 2.0**-14
"""Least normal float16. The steps below it are of one size, 2^-24: a tensor whose largest value lies below this keeps
less than the 11 bits of it that all others keep."""

PEAKS: Final = "peaks.json"


@dataclass(frozen=True, slots=True)
class Peaks:
    """`peaks.json`: name -> largest absolute value of a parameter, or of what a module puts out."""

    folder: Path
    component: str
    digest: str = ""

    def read(self) -> dict[str, float]:
        found: dict[str, float] = json.loads((self.folder / PEAKS).read_bytes())
        return found


def write_peaks(peaks: Mapping[str, float], folder: Path) -> None:
    """Write `peaks.json`."""
    (folder / PEAKS).write_text(json.dumps(dict(peaks), indent=0, allow_nan=False) + "\n")


@dataclass(frozen=True)
class ScanWeights(Stage[Peaks], name="scan", version=1, tools=("numpy",)):
    """The largest absolute value of every parameter of two or more dimensions; one is in memory at a time."""

    source: ComponentSource

    def run(self, into: Path) -> Peaks:
        weights, peaks = Weights(self.source), {}
        for name in weights.names():
            if len(weights.spec(name)[1]) > 1:
                values = weights.read(name)
                peaks[name] = max(float(values.max(initial=0)), -float(values.min(initial=0)))
                if not np.isfinite(peaks[name]):
                    raise ModelError(
                        f"{self.source.component}/{name} holds a NaN or an infinity",
                        hint="the checkpoint is damaged; no conversion mends it",
                    )
        write_peaks(peaks, into)
        return Peaks(into, self.source.component)


def with_islands(
    plan: Plan, shapes: Shapes, weights: Mapping[str, float], activations: Mapping[str, float], *, mixes: bool
) -> tuple[Plan, tuple[str, ...]]:
    """`plan` with what does not fit float16 kept in float32, and remarks for people.

    Args:
        weights: parameter -> peak.
        activations: module -> peak of its output along the trajectories; empty where nobody looked.
        mixes: whether the target holds float16 and float32 weights in one model; if not, all of it stays float32.
    """
    halves = {name for name, shape in shapes.items() if plan.scheme(name, shape).is_half}
    heavy = {name for name in halves if weights[name] > FLOAT16_MAX}
    light = {name for name in halves if 0 < weights[name] < FLOAT16_NORMAL}
    hot = {module: peak for module, peak in activations.items() if peak > ACTIVATION_LIMIT}
    remarks = [
        f"{name} reaches {weights[name]:.4g}, beyond float16: its weights stay float32" for name in sorted(heavy)
    ]
    remarks += [
        f"{name} stays below {weights[name]:.2g}, where float16 has few bits: its weights stay float32"
        for name in sorted(light)
    ]
    computed = {name for name in halves if plan.scheme(name, shapes[name]).computes_half}
    if hot:
        worst = max(hot, key=lambda module: hot[module])
        remarks.append(
            f"activations reach {hot[worst]:.4g} at {worst} ({len(hot)} modules above {ACTIVATION_LIMIT:.0f}): "
            + (
                "these stay float32"
                if computed
                else "in float16 arithmetic they may overflow; let the runtime compute this model in float32"
            )
        )
    kept = heavy | light | {name for name in halves if name.rpartition(".")[0] in hot}
    if not kept:
        return plan, tuple(remarks)
    if not mixes:
        return Plan("fp32"), (*remarks, "the runtime holds one kind of float a model: all of it stays float32")
    share = sum(prod(shapes[name]) for name in kept) / sum(prod(shape) for shape in shapes.values())
    remarks.append(f"{len(kept)} of {len(shapes)} tensors stay float32, {100 * share:.2g} % of the weights")
    exceptions = {**dict(plan.exceptions), **dict.fromkeys(kept, KEEP)}
    return replace(plan, exceptions=tuple(sorted(exceptions.items()))), tuple(remarks)
