"""What fewer bits cost or win in time: a model next to the same runtime's float32, turn by turn on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from math import comb
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...runtimes.inputs import native_feeds
from ...runtimes.isolation import open_isolated
from ...stages.artifacts import TargetModel
from ...stages.stage import Stage
from ..reference.probes import Probes
from ..stages import in_form
from .latency import SETTLE

SLOWER: Final = 1.10
"""A model is called slower when the whole 95 % interval of its ratio lies above this.

Raced against itself, the demo's float32 UNet (3 ms a call) came out at 0.95, 1.02 and 1.06 with intervals of two or
three hundredths: two loads of one model differ by the place of their memory. Busy machines only widen the interval.
"""

LEAST_TURNS: Final = 5
MOST_TURNS: Final = 60
_LONG: Final = 1.0  # seconds
ENOUGH: Final = 3.0  # seconds of native time after which turns end if the verdict is clear
CLEAR_TURNS: Final = 12
CALM: Final = 0.05
"""A turn is calm when the threads of both racers waited for a processor for at most this share of their time.

Two threads of ONNX Runtime next to other work: turns of 3 ms take 15 or 90, as the kernel has it, so that the demo's
UNet at `w8c_a8` came out at 8.4 times float32's time; at 1.1 in calm turns.
"""
AT_MOST: Final = 15.0  # ... and if it is not

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
    """Median milliseconds of a model and of float32; median of their ratios turn by turn, with its 95 % interval."""

    folder: Path
    component: str
    median_ms: float
    plain_ms: float
    ratio: float
    interval: tuple[float, float]
    turns: int  # that count
    calm: bool = True  # False: other work took the processor in nearly all turns, and the ratio is rough
    threads: int = 0  # of each racer
    digest: str = ""


@dataclass(frozen=True)
class MeasureSpeed(Stage[Speed], name="speed", version=4, tools=()):
    """Race a model against the same runtime's float32, each in a process of its own."""

    model: TargetModel
    plain: TargetModel
    probes: Probes  # feeds: the first probe of the component
    time_embedding: Mapping[str, Any]
    runtime_version: str
    machine: str
    threads: int
    form: str = ""

    @property
    def runtime(self) -> str:
        return self.model.target

    @property
    def precision(self) -> str:
        return self.model.precision

    def run(self, into: Path) -> Speed:
        # Of two threads one waits for the other, wherever that one is; one alone may be calm where two are not. Calls
        # of seconds are not repeated: no turn of theirs is without other work, and all have their share of it.
        for threads in dict.fromkeys((self.threads, 1)):
            ours, theirs, calm = self._race(threads)
            if calm or min(ours) > _LONG:
                break
        ratios = np.array(ours) / np.array(theirs)
        low, high = median_interval(ratios.tolist())
        return Speed(
            into,
            self.model.component,
            1e3 * float(np.median(ours)),
            1e3 * float(np.median(theirs)),
            round(float(np.median(ratios)), 3),
            (round(low, 3), round(high, 3)),
            len(ours),
            calm,
            threads,
        )

    def _race(self, threads: int) -> tuple[list[float], list[float], bool]:
        probe = next(self.probes.read(self.model.component))
        with ExitStack() as stack:
            racers = []
            for model in (in_form(self.model, self.form), in_form(self.plain, self.form)):
                session = stack.enter_context(open_isolated(OPENER, model, threads=threads, timed=True))
                racers.append((session, native_feeds(probe.feeds, session.inputs, self.time_embedding)))
            return take_turns(racers)


def take_turns(racers: Sequence[tuple[Any, Any]]) -> tuple[list[float], list[float], bool]:
    """Seconds of both racers (session, feeds), who take turns and change places each round; a warm-up is dropped.

    Turns end when the interval of the ratio lies on one side of `SLOWER`, or enough time has been spent. Only calm
    turns count, unless there are fewer than `LEAST_TURNS` of them; the last value says whether it is they that count.
    """
    turns: list[tuple[float, float]] = []
    calm: list[tuple[float, float]] = []
    spent = 0.0
    for turn in range(MOST_TURNS + 1):
        order = list(enumerate(racers))
        seconds, waited = [0.0, 0.0], [0.0, 0.0]
        for number, (session, feeds) in order if turn % 2 else order[::-1]:
            time.sleep(SETTLE)
            session.run(feeds)
            seconds[number], waited[number] = session.last_seconds, session.last_waited
        if not turn:
            continue
        turns.append((seconds[0], seconds[1]))
        if all(wait <= CALM * whole for wait, whole in zip(waited, seconds, strict=True)):
            calm.append(turns[-1])
        spent += sum(seconds)
        counted = calm if len(calm) >= LEAST_TURNS else turns
        if turn < LEAST_TURNS or (counted is not calm and spent <= AT_MOST):
            continue
        low, high = median_interval([ours / theirs for ours, theirs in counted])
        clear = low > SLOWER or high < SLOWER
        if (clear and len(counted) >= CLEAR_TURNS) or spent > (ENOUGH if clear else AT_MOST):
            break
    return [ours for ours, _ in counted], [theirs for _, theirs in counted], counted is calm


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median lies with a confidence of 95 %, by the binomial distribution of ranks; all of few values."""
    ranked, count = sorted(values), len(values)
    below, rank = 0.0, 0
    while (below := below + comb(count, rank) / 2**count) <= 0.025:
        rank += 1
    return ranked[max(rank - 1, 0)], ranked[min(count - rank, count - 1)]


def whole_ratio(speeds: Mapping[str, Speed], calls: Mapping[str, int], *, least: bool = False) -> float:
    """Time of a picture of so many calls, divided by float32's; `least`: by the low ends of the intervals."""
    weights = {name: speeds[name].plain_ms * count for name, count in calls.items() if name in speeds}
    ratios = {name: speeds[name].interval[0] if least else speeds[name].ratio for name in weights}
    return sum(ratios[name] * weight for name, weight in weights.items()) / sum(weights.values())


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
