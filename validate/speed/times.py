"""Milliseconds of several builds of one component, turn by turn: what the mixtures of a search's menu take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from ...runtimes.inputs import native_feeds
from ...runtimes.isolation import open_isolated
from ...stages.artifacts import TargetModel
from ...stages.stage import Stage
from ..reference.probes import Probes
from .latency import SETTLE
from .race import CALM, OPENER

ROUNDS: Final = 9  # in which every model runs once, after a warm-up


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of each model: the median of rounds in which it did not wait for a processor, else the least."""

    folder: Path
    ms: tuple[float, ...]
    digest: str = ""


@dataclass(frozen=True)
class MeasureTimes(Stage[Times], name="times", version=2, tools=()):
    """Run `models`, each in a process of its own, on the first probe of their component. All are open at once."""

    models: tuple[TargetModel, ...]
    probes: Probes
    time_embedding: Mapping[str, Any]
    runtime_version: str
    machine: str
    threads: int

    def run(self, into: Path) -> Times:
        probe = next(self.probes.read(self.models[0].component))
        every: list[list[float]] = [[] for _ in self.models]
        calm: list[list[float]] = [[] for _ in self.models]
        with ExitStack() as stack:
            sessions = [
                stack.enter_context(open_isolated(OPENER, m, threads=self.threads, timed=True)) for m in self.models
            ]
            feeds = [native_feeds(probe.feeds, session.inputs, self.time_embedding) for session in sessions]
            for turn in range(ROUNDS + 1):
                for number, session in enumerate(sessions):
                    time.sleep(SETTLE)
                    session.run(feeds[number])
                    if turn:
                        every[number].append(session.last_seconds)
                        if session.last_waited <= CALM * session.last_seconds:
                            calm[number].append(session.last_seconds)
        # other work only ever adds to a time
        return Times(into, tuple(1e3 * (median(c) if c else min(e)) for c, e in zip(calm, every, strict=True)))
