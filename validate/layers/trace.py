"""PyTorch's tensors between its modules, saved to disk as they pass by, one in memory at a time."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...quantize.codes_file import QuantizedWeights
from ...quantize.plan import Plan
from ...runtimes.protocol import Feeds
from ...stages.artifacts import ComponentSource
from ...stages.stage import Stage
from ..reference.probes import Probes
from ..reference.torch_session import TorchModel, TorchSession
from .points import hooks

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TracedPoints:
    """A folder of `00000.npy`, one a point."""

    folder: Path
    points: tuple[int, ...]
    digest: str = ""


@dataclass(frozen=True)
class TracePoints(
    Stage[TracedPoints],
    name="trace",
    version=1,
    tools=("torch", "diffusers", "transformers"),
    aside=("events", "threads"),
):
    """Run PyTorch once over one probe and save what is `wanted`."""

    probes: Probes
    source: ComponentSource
    plan: Plan  # how the weights are rounded before
    quantized: QuantizedWeights | None  # their codes, where the plan has any
    probe: int  # its number among the component's
    events: tuple[int, ...]  # from `find_points`
    wanted: tuple[int, ...]
    threads: int = 2

    def run(self, into: Path) -> TracedPoints:
        import torch

        torch.set_num_threads(self.threads)
        with TorchSession(TorchModel(self.source, self.probes.size, self.plan, self.quantized)) as session:
            (probe,) = islice(self.probes.read(self.source.component), self.probe, self.probe + 1)
            save_points(session, probe.feeds, self.events, set(self.wanted), into)
        return TracedPoints(into, self.wanted)


def save_points(
    session: TorchSession, feeds: Feeds, events: tuple[int, ...], wanted: Collection[int], into: Path
) -> None:
    """Run `session` and save the points `wanted` as they are made."""
    calls = iter(events)
    saved: set[int] = set()

    def watch(path: str, kind: str, tensor: Tensor | None) -> None:
        point = next(calls)
        if tensor is not None and point in wanted and point not in saved:
            saved.add(point)
            np.save(into / f"{point:05}.npy", tensor.numpy())

    with hooks(session.module, watch, watch):
        session.run(feeds)
    if next(calls, None) is not None or saved != set(wanted):
        raise RuntimeError("a run with weights called other modules than one without")


@dataclass(frozen=True, slots=True)
class Peaks:
    """Largest magnitude of every point over all probes of a component; infinite where one overflowed."""

    folder: Path
    largest: tuple[float, ...]
    at: tuple[int, ...]  # the probe, by number, that reached it
    digest: str = ""


@dataclass(frozen=True)
class MeasurePeaks(
    Stage[Peaks], name="peaks", version=1, tools=("torch", "diffusers", "transformers"), aside=("events",)
):
    """Run PyTorch in float32 over all probes, which lie along denoising trajectories, and keep each point's peak."""

    probes: Probes
    source: ComponentSource
    events: tuple[int, ...]
    points: int

    def run(self, into: Path) -> Peaks:
        largest, at = np.zeros(self.points), np.zeros(self.points, int)
        with TorchSession(TorchModel(self.source, self.probes.size)) as session:
            for number, probe in enumerate(self.probes.read(self.source.component)):
                for point, peak in enumerate(peaks_of(session, probe.feeds, self.events, self.points)):
                    if peak > largest[point]:
                        largest[point], at[point] = peak, number
        return Peaks(into, tuple(map(float, largest)), tuple(map(int, at)))


def peaks_of(session: TorchSession, feeds: Feeds, events: tuple[int, ...], points: int) -> list[float]:
    """Largest magnitude of every point in one run."""
    calls = iter(events)
    peaks = [0.0] * points

    def watch(path: str, kind: str, tensor: Tensor | None) -> None:
        point = next(calls)
        if tensor is not None and point >= 0:
            peaks[point] = float(tensor.abs().max())

    with hooks(session.module, watch, watch):
        session.run(feeds)
    return peaks
