"""Partial runs in a child process: a broken module may take the process down, and memory must be measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...stages.artifacts import TargetModel
from ...stages.stage import Stage
from ..reference.probes import read_arrays
from .examine import Findings, Subject, examine, read_points
from .pieces import Piece


@dataclass(frozen=True, slots=True)
class Examined:
    """What was measured."""

    folder: Path
    findings: Findings
    partial_runs: int
    digest: str = ""


@dataclass(frozen=True)
class ExaminePieces(Stage[Examined], name="layers", version=1, tools=("numpy",)):
    """Run some neighbouring pieces. Never cached: it is about what lies on the disk."""

    model: TargetModel
    pieces: tuple[Piece, ...]
    at: Mapping[str, int]  # tap -> point, of all pieces
    inputs: Path  # npz, as the runtime takes them
    reference: Path  # folders of points
    full: Path | None
    own: Path
    batchless: bool
    flat: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    threads: int

    def run(self, into: Path) -> Examined:
        from ...runtimes.registry import get_target
        from ...runtimes.taps import Tapped

        target = get_target(self.model.target)
        assert isinstance(target, Tapped)
        with target.open_taps(self.model, threads=self.threads) as session:
            found = examine(
                Subject(session, read_arrays(self.inputs), self.at, self.batchless, self.flat, self.shapes),
                self.pieces,
                reference=read_points(self.reference),
                full=read_points(self.full) if self.full else None,
                own=self.own,
            )
            return Examined(into, found, session.partial_runs)
