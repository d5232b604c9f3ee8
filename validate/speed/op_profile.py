"""`profile --ops`: which operations of a runtime's own graph a component spends its time in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...runtimes.op_times import OpTime
from ...stages.artifacts import TargetModel
from ...stages.stage import Stage
from ..reference.probes import read_arrays

if TYPE_CHECKING:
    from rich.table import Table

SLOWEST: Final = 10  # operations that a table names

OPS_METHOD: Final = (
    "operations: each timed on its own, median of the runs after a warm-up, in a run of their own; measuring costs "
    "time, so trust their shares and take milliseconds from the whole"
)


@dataclass(frozen=True, slots=True)
class OpProfile:
    """Operations in the order of execution."""

    folder: Path
    component: str
    ops: tuple[OpTime, ...]
    digest: str = ""

    @property
    def total_ms(self) -> float:
        return sum(op.ms for op in self.ops)

    def kinds(self) -> list[tuple[str, int, float]]:
        """Kind of operation, how many, milliseconds together; the most expensive first."""
        found: dict[str, list[float]] = {}
        for op in self.ops:
            found.setdefault(op.op, []).append(op.ms)
        return sorted(((kind, len(ms), sum(ms)) for kind, ms in found.items()), key=lambda row: -row[2])

    def slowest(self) -> Sequence[OpTime]:
        return sorted(self.ops, key=lambda op: -op.ms)[:SLOWEST]

    def to_json(self) -> dict[str, Any]:
        total = self.total_ms or 1.0
        return {
            "total_ms": round(self.total_ms, 3),
            "kinds": [
                {"op": kind, "count": count, "ms": round(ms, 3), "share": round(ms / total, 4)}
                for kind, count, ms in self.kinds()
            ],
            "slowest": [
                {"name": op.name, "op": op.op, "module": op.module, "ms": round(op.ms, 3)} for op in self.slowest()
            ],
        }


@dataclass(frozen=True)
class TimeOps(Stage[OpProfile], name="ops", version=1, tools=("numpy",)):
    """Time the operations of one model. Never cached: it is about this machine in this minute."""

    model: TargetModel
    feeds: Path  # npz, as the runtime takes them
    threads: int
    runs: int

    def run(self, into: Path) -> OpProfile:
        from ...runtimes.op_times import OpTimed
        from ...runtimes.registry import get_target

        target = get_target(self.model.target)
        assert isinstance(target, OpTimed)  # asked for by `validate.speed.measure_ops`
        times = target.time_ops(self.model, read_arrays(self.feeds), threads=self.threads, runs=self.runs)
        return OpProfile(into, self.model.component, times.ops)


def ops_table(profile: OpProfile) -> Table:
    """Kinds with their shares, then the slowest operations by name."""
    from rich.table import Table

    table = Table(title=f"{profile.component}: where {profile.total_ms:.2f} ms go", title_justify="left")
    table.add_column("operation")
    for heading in ("count", "ms", "share"):
        table.add_column(heading, justify="right")
    table.add_column("module", overflow="fold")
    total = profile.total_ms or 1.0
    for kind, count, ms in profile.kinds():
        table.add_row(kind, str(count), f"{ms:.2f}", f"{ms / total:.1%}", "")
    table.add_section()
    for op in profile.slowest():
        table.add_row(f"{op.op} {op.name}", "1", f"{op.ms:.2f}", f"{op.ms / total:.1%}", op.module)
    return table
