"""The error that a UNet makes at each timestep, fed with PyTorch's own latents, so that no error adds up.

How errors add up is the drift of pictures; this says where along the trajectory they arise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np

from ...runtimes.inputs import native_feeds
from ...runtimes.protocol import Array, Session
from ...stages.errors import ParityError, ToolCrashed
from ..parity import compare, finite_db
from ..reference.probes import Branch, ProbePlan, Probes, RoundedAnswers
from .activation_bits import ActivationBits


@dataclass(frozen=True, slots=True)
class TimestepError:
    """What was measured at one timestep: dB of each call, in the order of prompts and branches of guidance."""

    timestep: float
    calls_db: tuple[float, ...]  # against PyTorch in float32
    same_weights_db: tuple[float, ...]  # against PyTorch with equally rounded weights; empty for a model at float32
    noise_share: float | None = None  # of a latent's power at this timestep; None: its schedule has no such formula

    @property
    def snr_db(self) -> float:
        return min(self.calls_db)

    @property
    def least_same_weights_db(self) -> float | None:
        return min(self.same_weights_db, default=None)

    def to_json(self) -> dict[str, Any]:
        same = self.least_same_weights_db
        return {
            "timestep": self.timestep,
            "snr_db": finite_db(self.snr_db),
            "same_weights_db": None if same is None else finite_db(same),
            "calls_db": [finite_db(value) for value in self.calls_db],
            "noise_share": self.noise_share,
        }


@dataclass(frozen=True, slots=True)
class TimestepCurve:
    """The UNet along a trajectory, from the noisiest timestep to the last."""

    component: str  # the denoiser
    points: tuple[TimestepError, ...]
    steps: int  # of the schedule, not all of which need be among the points
    scheduler: str = ""  # empty: the checkpoint's own
    activations: ActivationBits | None = None
    problem: str = ""  # why there is no curve

    @property
    def ok(self) -> bool:
        """Whether every call gave numbers; how good they have to be is said by the component's gate."""
        return not self.problem

    @property
    def worst(self) -> TimestepError:
        return min(self.points, key=lambda point: point.snr_db)

    @property
    def best(self) -> TimestepError:
        return max(self.points, key=lambda point: point.snr_db)

    @property
    def slope(self) -> float | None:
        """dB gained in 100 timesteps towards noise: the least-squares line through all points; None for one point."""
        if len(self.points) < 2:
            return None
        times = [point.timestep for point in self.points]
        line = np.polynomial.Polynomial.fit(times, [finite_db(point.snr_db) for point in self.points], 1)
        return float(line.convert().coef[-1]) * 100

    @property
    def line(self) -> str:
        """For people, in one line."""
        if self.problem:
            return f"UNet by timestep: {self.problem}"
        worst, best = self.worst, self.best
        line = f"worst {_words(worst.snr_db)} at t = {worst.timestep:g}, best {_words(best.snr_db)} at t = "
        line += f"{best.timestep:g}"
        if self.slope is not None:
            line += f", {self.slope:+.1f} dB per 100 timesteps towards noise"
        same = [found for point in self.points if (found := point.least_same_weights_db) is not None]
        if same:
            line += f"; same weights {_words(min(same))} to {_words(max(same))}"
        count = "" if len(self.points) >= self.steps else f" ({len(self.points)} of {self.steps} steps)"
        return f"UNet by timestep{count}: {line}"

    def to_json(self) -> dict[str, Any]:
        return {
            "component": self.component,
            "ok": self.ok,
            "problem": self.problem or None,
            "steps": self.steps,
            "scheduler": self.scheduler or None,
            "worst_timestep": self.worst.timestep if self.points else None,
            "best_timestep": self.best.timestep if self.points else None,
            "slope_db_per_100": self.slope,
            "points": [point.to_json() for point in self.points],
            "activations": self.activations.to_json() if self.activations else None,
        }


def curve_plan(plan: ProbePlan) -> ProbePlan:
    """The calls that the curve is made of: every one of each prompt of `plan`, which is of pictures, once."""
    branches: tuple[Branch, ...] = ("conditional",)
    if plan.guidance_mode == "cfg":
        branches = ("conditional", "unconditional")
    every = tuple((step, branch) for step in range(plan.steps) for branch in branches)
    if set(plan.picked) == set(every):  # a distilled model's few steps: PyTorch was asked them all
        return plan
    return replace(plan, prompts=tuple(dict.fromkeys(plan.prompts)), texts=(), picked=every)


def measure_timesteps(
    session: Session,
    component: str,
    probes: Probes,
    answers: RoundedAnswers | None,
    time_embedding: Mapping[str, Any],
    noise_shares: Mapping[float, float],
) -> TimestepCurve:
    """Ask the UNet in `session` every call of `probes`.

    Args:
        component: its name.
        answers: PyTorch's with equally rounded weights, in the order of the probes; None for a model at float32.
        noise_shares: timestep -> share of noise in a latent's power, for those that are known.
    """
    curve = TimestepCurve(component, (), probes.plan.steps, probes.plan.scheduler)
    losses: dict[float, list[float]] = {}
    fidelities: dict[float, list[float]] = {}
    references: Iterator[Mapping[str, Array] | None] = answers.read() if answers else repeat(None)
    try:
        for probe, reference in zip(probes.read(component), references, strict=answers is not None):
            timestep = float(probe.feeds["timestep"])
            results = session.run(native_feeds(probe.feeds, session.inputs, time_embedding))
            for name, expected in probe.outputs.items():
                where = f"{component}, {probe.label}, {name}"
                losses.setdefault(timestep, []).append(compare(expected, results[name], where=where).snr_db)
                if reference is not None:
                    same = compare(reference[name], results[name], where=where).snr_db
                    fidelities.setdefault(timestep, []).append(same)
    except (ToolCrashed, ParityError) as problem:
        return replace(curve, problem=problem.what)
    points = [
        TimestepError(t, tuple(found), tuple(fidelities.get(t, ())), noise_shares.get(t))
        for t, found in sorted(losses.items(), reverse=True)
    ]
    return replace(curve, points=tuple(points))


def _words(decibel: float) -> str:
    return "equal" if np.isinf(decibel) else f"{decibel:.1f} dB"
