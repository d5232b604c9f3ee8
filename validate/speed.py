"""What fewer bits cost or win in time: a model next to the same runtime's float32, turn by turn on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from ..pipeline.artifacts import TargetModel
from ..runtimes.inputs import native_feeds
from ..runtimes.isolation import open_isolated
from .latency import SETTLE
from .probes import Probes
from .stages import in_form

SLOWER: Final = 1.10
"""A ratio of times above which a model is called slower.

Two loads of one and the same float32 model of the demo, measured like this on a machine with three times as many
busy threads as cores, differed by up to 8 %; on a quiet one by 2 %.
"""

LEAST_TURNS: Final = 5
MOST_TURNS: Final = 15
ENOUGH: Final = 3.0  # seconds of native time after which more turns would tell little more

OPENER: Final = "diffusette.runtimes.registry:open_model"

_UNITS: Final = {  # flag of /proc/cpuinfo -> what people call it
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX",
    "asimddp": "dot product (ARMv8.2)",
    "i8mm": "int8 matrix product (ARMv8.6)",
}


@dataclass(frozen=True, slots=True)
class Speed:
    """Median milliseconds of a model and of float32, and the median of their ratios turn by turn, with quartiles."""

    folder: Path
    component: str
    median_ms: float
    plain_ms: float
    ratio: float
    quartiles: tuple[float, float]
    turns: int
    digest: str = ""

    @property
    def is_slower(self) -> bool:
        return self.ratio > SLOWER


@dataclass(frozen=True)
class MeasureSpeed:
    """Race a model against the same runtime's float32, each in a process of its own."""

    model: TargetModel
    plain: TargetModel
    probes: Probes  # feeds: the first probe of the component
    time_embedding: Mapping[str, Any]
    runtime_version: str
    machine: str
    threads: int
    form: str = ""

    name: ClassVar[str] = "speed"
    version: ClassVar[int] = 1
    tools: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[type] = Speed

    @property
    def precision(self) -> str:
        return self.model.precision

    def key(self) -> Mapping[str, object]:
        return {
            "model": self.model.digest,
            "plain": self.plain.digest,
            "probes": self.probes.digest,
            "runtime": self.runtime_version,
            "machine": self.machine,
            "threads": self.threads,
            "form": self.form,
        }

    def run(self, into: Path) -> Speed:
        probe = next(self.probes.read(self.model.component))
        with ExitStack() as stack:
            racers = []
            for model in (in_form(self.model, self.form), in_form(self.plain, self.form)):
                session = stack.enter_context(open_isolated(OPENER, model, threads=self.threads, timed=True))
                racers.append((session, native_feeds(probe.feeds, session.inputs, self.time_embedding)))
            ours, theirs = take_turns(racers)
        ratios = np.array(ours) / np.array(theirs)
        low, middle, high = (float(q) for q in np.percentile(ratios, (25, 50, 75)))
        return Speed(
            into,
            self.model.component,
            1e3 * float(np.median(ours)),
            1e3 * float(np.median(theirs)),
            round(middle, 3),
            (round(low, 3), round(high, 3)),
            len(ours),
        )


def take_turns(racers: Sequence[tuple[Any, Any]]) -> list[list[float]]:
    """Seconds of each racer (session, feeds), who take turns and change places each round; one warm-up is dropped."""
    seconds: list[list[float]] = [[] for _ in racers]
    for turn in range(MOST_TURNS + 1):
        order = list(enumerate(racers))
        for number, (session, feeds) in order if turn % 2 else order[::-1]:
            time.sleep(SETTLE)
            session.run(feeds)
            if turn:
                seconds[number].append(session.last_seconds)
        if turn >= LEAST_TURNS and sum(map(sum, seconds)) > ENOUGH:
            break
    return seconds


def whole_ratio(speeds: Mapping[str, Speed], calls: Mapping[str, int]) -> float:
    """Time of a picture that calls each component so often, divided by float32's."""
    ours = sum(speeds[name].median_ms * count for name, count in calls.items() if name in speeds)
    theirs = sum(speeds[name].plain_ms * count for name, count in calls.items() if name in speeds)
    return ours / theirs


@cache
def int8_unit(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The processor's unit for sums of int8 products; "" when it has none, None when that cannot be told."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return None
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), None)
    if flags is None:
        return None
    return next((name for flag, name in _UNITS.items() if flag in flags), "")
