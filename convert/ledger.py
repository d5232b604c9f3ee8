"""What a conversion's stages took, beside what was forecast for them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..stages.cache import Cache
from ..stages.cache_object import ARTIFACT
from ..stages.stage import Runner, Stage, place_of
from .forecast import Forecast

TOLERANCE: Final = 0.2  # share of what was measured
_NO_MATTER_MIB: Final = 96.0  # the interpreter and its libraries differ so much from machine to machine
_NO_MATTER_BYTES: Final = 2 * 10**7  # graphs, and the reference's answers


@dataclass(frozen=True, slots=True)
class Taken:
    """What one stage took, when it ran: now, or when its result came into the cache."""

    peak_mib: float  # of the stage's process and the programs that it started
    bytes: int  # of its artifact
    seconds: float  # of processor time

    def to_json(self) -> dict[str, Any]:
        return {"memory_mib": round(self.peak_mib), "disk_bytes": self.bytes, "cpu_seconds": round(self.seconds, 1)}


@dataclass(frozen=True, slots=True)
class Compared:
    """One stage, forecast and measured; of several with one name (forms, precisions) the most."""

    stage: str
    forecast_mib: float
    measured_mib: float
    forecast_bytes: int
    measured_bytes: int
    seconds: float = 0.0  # of processor time, measured

    def misses(self) -> Iterator[str]:
        """What was forecast badly, in words."""
        if _is_off(self.forecast_mib, self.measured_mib, _NO_MATTER_MIB):
            yield f"{self.stage}: {self.measured_mib:.0f} MiB of memory, forecast {self.forecast_mib:.0f} MiB"
        if _is_off(self.forecast_bytes, self.measured_bytes, _NO_MATTER_BYTES):
            found, told = (number / 1e6 for number in (self.measured_bytes, self.forecast_bytes))
            yield f"{self.stage}: {found:.0f} MB of disk, forecast {told:.0f} MB"

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "memory_mib": {"forecast": round(self.forecast_mib), "measured": round(self.measured_mib)},
            "disk_bytes": {"forecast": self.forecast_bytes, "measured": self.measured_bytes},
            "cpu_seconds": round(self.seconds, 1),
        }


def _is_off(told: float, found: float, no_matter: float) -> bool:
    return abs(told - found) > max(TOLERANCE * found, no_matter)


class Ledger:
    """A `Runner` that remembers which stages it ran, to look up afterwards what they took."""

    def __init__(self, run: Runner, cache: Cache) -> None:
        self._run = run
        self._cache = cache
        self._digests: dict[str, str] = {}  # of artifacts -> name of the stage

    def __call__(self, stage: Stage[Any]) -> Any:
        artifact = self._run(stage)
        self._digests[artifact.digest] = place_of(stage)
        return artifact

    def taken(self) -> dict[str, Taken]:
        """By the stage's name; of several with one name the most."""
        found: dict[str, Taken] = {}
        for digest, name in self._digests.items():
            taken = _taken(json.loads((self._cache.folder(digest) / ARTIFACT).read_bytes()))
            other = found.get(name, taken)
            found[name] = Taken(
                max(taken.peak_mib, other.peak_mib), max(taken.bytes, other.bytes), max(taken.seconds, other.seconds)
            )
        return found

    def run_mib(self, target: str) -> dict[str, float]:
        """Component -> peak memory of the process that ran it on `target`, as `Forecast.run_mib` forecasts it."""
        label = f" gate {target}"
        taken = self.taken()
        return {name.removesuffix(label): round(taken[name].peak_mib) for name in taken if name.endswith(label)}


def _taken(record: Mapping[str, Any]) -> Taken:
    measured = record["measured"]
    # objects of older versions know the peak with the parent only
    peak = max(measured["own_peak_mib"], measured.get("stage_peak_mib", 0.0))
    return Taken(peak, sum(file["bytes"] for file in record["files"].values()), measured.get("cpu_seconds", 0.0))


def compared(forecast: Forecast, taken: Mapping[str, Taken]) -> tuple[Compared, ...]:
    """Every stage that was forecast from measurements and that ran, in the order of the forecast."""
    both = [(told, taken[told.label]) for told in forecast.stages if told.fitted and told.label in taken]
    return tuple(
        Compared(told.label, told.peak_mib, took.peak_mib, told.disk_bytes, took.bytes, took.seconds)
        for told, took in both
    )
