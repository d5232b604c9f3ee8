"""What a conversion hands back: its bundles, what the gates found, and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..bundle.bundle import Bundle

if TYPE_CHECKING:
    from ..validate.machines.report import MachineReport
    from ..validate.report import ParityReport
    from .forecast import Forecast
    from .ledger import Compared, Taken
    from .search.goal import Found


@dataclass(frozen=True, slots=True)
class Converted:
    """One target's bundle, and what the gate found (None with `--no-gate`)."""

    bundle: Bundle
    parity: ParityReport | None
    machines: tuple[MachineReport, ...] = ()  # what each machine computed, where it was run on any

    @property
    def ok(self) -> bool:
        return (self.parity is None or self.parity.ok) and all(report.ok for report in self.machines)


@dataclass(frozen=True, slots=True)
class Conversion:
    """All bundles of one command, and what it took."""

    converted: tuple[Converted, ...]
    forecast: Forecast
    seconds: float
    peak_mib: float  # of this process and its children together
    stages: tuple[Mapping[str, Any], ...]
    moved: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by adapters: component -> weight -> share
    found: Found | None = None  # what a search chose from
    compared: tuple[Compared, ...] = ()  # forecast and measured, stage by stage
    taken: Mapping[str, Taken] = field(default_factory=dict)  # by every stage, forecast or not

    @property
    def ok(self) -> bool:
        return all(each.ok for each in self.converted)

    def misses(self) -> list[str]:
        """Stages that took over 20 % more or less than was forecast, in words."""
        return [miss for stage in self.compared for miss in stage.misses()]

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "bundles": [
                {
                    "target": each.bundle.manifest.target.name,
                    "path": str(each.bundle.path),
                    "ok": each.ok,
                    "bytes": sum(file.bytes for file in dict.fromkeys(each.bundle.manifest.files())),
                    "gate": each.bundle.manifest.gate,
                    "parity": each.parity.to_json() if each.parity else None,
                    "machines": [report.to_json() for report in each.machines],
                }
                for each in self.converted
            ],
            **({"search": self.found.to_json()} if self.found else {}),
            "seconds": round(self.seconds, 1),
            "peak_mib": round(self.peak_mib),
            "forecast": self.forecast.to_json(),
            "stages": [dict(stage) for stage in self.stages],
            "compared": [stage.to_json() for stage in self.compared],
            "taken": {stage: taken.to_json() for stage, taken in self.taken.items()},
            "adapters_moved": {component: dict(moved) for component, moved in self.moved.items()},
        }
