"""How long one run of a component takes, next to PyTorch in the same minutes on the same machine.

Method: each model lives in its own process with `threads` threads; `warmup` runs are thrown away; then the models take
turns, run by run (A B A B ...), so that a machine that heats up or is busy slows both. The time is that of the native
call, taken inside the process: moving arrays between processes is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from ...runtimes.protocol import Feeds, Session
from ...stages.errors import UsageError
from .memory import DEFINITION, Memory
from .op_profile import OPS_METHOD, OpProfile

if TYPE_CHECKING:
    from rich.table import Table


SETTLE: Final = 0.1
"""Seconds between turns: thread pools of the one that just ran spin for a while, on cores that the next one needs."""

METHOD: Final = (
    "one component alone in its own process, median and 90th percentile of the native call after a warm-up, batch 1"
)
TURNS: Final = "PyTorch eager in float32 took turns with it, run by run"


class TimedSession(Session, Protocol):
    """A session in its own process, as `runtimes.isolation.open_isolated` returns it."""

    load_seconds: float
    last_seconds: float
    last_waited: float
    peak_rss_mib: float


@dataclass(frozen=True, slots=True)
class Contestant:
    """A model to be timed: how to load it, and feeds that fit its own inputs."""

    open: Callable[[], TimedSession]
    feeds: Callable[[Session], Feeds]


@dataclass(frozen=True, slots=True)
class Entrant:
    """A bundle's model of the component that is timed."""

    precision: str
    contestant: Contestant
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one run; seconds of loading, from the start of reading files to readiness."""

    median_ms: float
    p90_ms: float
    load_s: float
    memory: Memory


@dataclass(frozen=True, slots=True)
class ComponentProfile:
    """One component's speed, memory and size. `ratio` is its median over PyTorch's: below 1 it is faster."""

    component: str
    precision: str
    timing: Timing
    disk_bytes: int
    threads: int
    runs: int
    torch: Timing | None = None

    @property
    def ratio(self) -> float | None:
        return self.timing.median_ms / self.torch.median_ms if self.torch else None

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            **_timing_json(self.timing),
            "disk_bytes": self.disk_bytes,
            "threads": self.threads,
            "runs": self.runs,
            "torch": _timing_json(self.torch) if self.torch else None,
            "ratio_to_torch": round(self.ratio, 4) if self.ratio is not None else None,
        }


@dataclass(frozen=True, slots=True)
class ProfileReport:
    """All components of a bundle on this machine."""

    target: str
    components: tuple[ComponentProfile, ...]
    machine: str  # processor and cores, for people
    ops: tuple[OpProfile, ...] = ()

    @property
    def method(self) -> str:
        """How it was measured, in a sentence."""
        return f"{METHOD}; {TURNS}" if any(profile.torch for profile in self.components) else METHOD

    def to_json(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "target": self.target,
            "machine": self.machine,
            "components": {profile.component: profile.to_json() for profile in self.components},
            "method": self.method,
            "memory_definition": DEFINITION,
        }
        if self.ops:
            facts |= {"ops": {profile.component: profile.to_json() for profile in self.ops}, "ops_method": OPS_METHOD}
        return facts


def profile_component(
    component: str,
    entrants: Sequence[Entrant],
    *,
    threads: int,
    runs: int,
    warmup: int = 1,
    torch: Contestant | None = None,
) -> tuple[ComponentProfile, ...]:
    """Time a component of several bundles, taking turns with each other, and with PyTorch when `torch` is given.

    All models are loaded at the same time, each in its own process.

    Raises:
        UsageError: `runs` is below 1 or `warmup` below 0.
        ToolCrashed, NoRoom, FeedError: from the session.
    """
    if runs < 1 or warmup < 0:
        raise UsageError(f"{runs} runs after {warmup} of warm-up measure nothing", hint="ask for at least one run")
    racing = [entrant.contestant for entrant in entrants] + ([torch] if torch else [])
    timings = race(racing, runs=runs, warmup=warmup)
    beside = timings[len(entrants)] if torch else None
    return tuple(
        ComponentProfile(component, entrant.precision, timing, entrant.disk_bytes, threads, runs, torch=beside)
        for entrant, timing in zip(entrants, timings, strict=False)
    )


def race(contestants: Sequence[Contestant], *, runs: int, warmup: int) -> list[Timing]:
    """Let the contestants take turns, `runs` times each after `warmup` rounds that do not count."""
    with ExitStack() as stack:
        sessions = [stack.enter_context(contestant.open()) for contestant in contestants]
        loaded = [session.peak_rss_mib for session in sessions]
        feeds = [contestant.feeds(session) for contestant, session in zip(contestants, sessions, strict=True)]
        seconds: list[list[float]] = [[] for _ in sessions]
        for turn in range(warmup + runs):
            for session, feed, kept in zip(sessions, feeds, seconds, strict=True):
                time.sleep(SETTLE)
                session.run(feed)
                if turn >= warmup:
                    kept.append(session.last_seconds)
        return [
            Timing(
                median_ms=float(np.median(kept)) * 1e3,
                p90_ms=float(np.percentile(kept, 90)) * 1e3,
                load_s=session.load_seconds,
                memory=Memory(before, session.peak_rss_mib),
            )
            for session, kept, before in zip(sessions, seconds, loaded, strict=True)
        ]


def _timing_json(timing: Timing) -> Mapping[str, float]:
    return {
        "median_ms": round(timing.median_ms, 3),
        "p90_ms": round(timing.p90_ms, 3),
        "load_s": round(timing.load_s, 3),
        "loaded_rss_mib": round(timing.memory.loaded_mib, 1),
        "peak_rss_mib": round(timing.memory.peak_mib, 1),
    }


def profile_table(report: ProfileReport, *, explained: bool = True) -> Table:
    """The report for a terminal; where it is `explained`, the caption says how it was measured."""
    from rich.table import Table

    table = Table(
        title=f"{report.target} on {report.machine}",
        title_justify="left",
        caption=f"{report.method}. Memory: {DEFINITION}." if explained else None,
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    table.add_column("precision")
    for heading in (
        "median ms",
        "p90 ms",
        "vs torch",
        "load s",
        "peak MiB",
        "torch MiB",
        "disk MiB",
        "runs",
        "threads",
    ):
        table.add_column(heading, justify="right")
    for profile in report.components:
        timing = profile.timing
        table.add_row(
            profile.component,
            profile.precision,
            f"{timing.median_ms:.2f}",
            f"{timing.p90_ms:.2f}",
            f"{profile.ratio:.2f}x" if profile.ratio is not None else "-",
            f"{timing.load_s:.2f}",
            f"{timing.memory.peak_mib:.0f}",
            f"{profile.torch.memory.peak_mib:.0f}" if profile.torch else "-",
            f"{profile.disk_bytes / 2**20:.2f}",
            str(profile.runs),
            str(profile.threads),
        )
    return table
