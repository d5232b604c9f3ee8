"""What a bundle computes on another machine, as facts: for tables, for JSON, for the manifest, for the exit code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...runtimes.arithmetic import Arithmetic, Computed
from ...stages.artifacts import with_role
from ..parity import finite_db
from ..report import ComponentReport, OracleReport, PictureReport
from ..tolerances import ImageTolerance

if TYPE_CHECKING:
    from rich.table import Table

WEAKER: dict[Computed, int] = {"float16": 0, "bfloat16": 0, "float16 stored": 1, "bfloat16 stored": 1, "float32": 2}
"""How exact a kind of arithmetic is, the least exact first: a processor falls back to a higher one, never lower."""


def falls_back(expects: Computed, computed: Computed) -> bool:
    """Whether a processor that `computed` so, asked for `expects`, has no instructions for what it was asked for."""
    return WEAKER.get(computed, 0) > WEAKER.get(expects, 0)


@dataclass(frozen=True, slots=True)
class ArithmeticRow:
    """One arithmetic on one machine.

    Args:
        computed: what the probe found there.
        components: one report each; the form that is nearest to failing.
        picture: None where none was drawn.
    """

    arithmetic: Arithmetic
    computed: Computed
    components: tuple[ComponentReport, ...]
    image_tolerance: ImageTolerance
    picture: PictureReport | None = None
    picture_problem: str = ""

    @property
    def falls_back(self) -> bool:
        """Whether the processor computes more exactly than the arithmetic asks for, having no instructions for it."""
        return falls_back(self.arithmetic.expects, self.computed)

    def component(self, name: str) -> ComponentReport:
        """The report of one."""
        return next(part for part in self.components if part.component == name)

    @property
    def ok(self) -> bool:
        """Whether nothing that was compared failed."""
        return all(part.ok for part in self.components) and self.picture_ok

    @property
    def picture_ok(self) -> bool:
        """Whether the picture, where one was drawn, is near enough."""
        if self.picture_problem:
            return False
        return self.picture is None or self.picture.image.psnr_db >= self.image_tolerance.min_psnr_db

    @property
    def verdict(self) -> str:
        """In few words; claims no more than was compared."""
        if bad := [part.component for part in self.components if not part.ok]:
            died = [part.problem for part in self.components if part.problem]
            return f"FAILED: {died[0] if died else ', '.join(bad)}"
        if not self.picture_ok:
            return f"FAILED: picture{': ' + self.picture_problem if self.picture_problem else ''}"
        if self.falls_back:
            return f"falls back to {self.computed}"
        return "passed" if self.picture else "passed without picture"

    def to_json(self) -> dict[str, Any]:
        return {
            "arithmetic": self.arithmetic.name,
            "options": dict(self.arithmetic.options),
            "default": self.arithmetic.is_default,
            "expects": self.arithmetic.expects,
            "computes": self.computed,
            "ok": self.ok,
            "verdict": self.verdict,
            "components": {part.component: part.to_json() for part in self.components},
            "picture": self.picture.to_json() if self.picture else None,
            "picture_needed_db": self.image_tolerance.min_psnr_db,
            "picture_problem": self.picture_problem or None,
        }


@dataclass(frozen=True, slots=True)
class MachineReport:
    """A bundle on one machine.

    Args:
        proven: component -> name of the arithmetic in which it was proven where it was made, which must pass.
        recommended: component -> name of an arithmetic, the fastest whose picture passes; empty: none was found.
        recommended_db: PSNR of the picture in it; None where none was drawn.
        probes: component -> how many of PyTorch's answers were compared.
    """

    machine: str
    target: str
    runtime: str  # version there
    rows: tuple[ArithmeticRow, ...]
    proven: Mapping[str, str]
    recommended: Mapping[str, str]
    recommended_db: float | None = None
    probes: Mapping[str, int] | None = None
    oracle: OracleReport | None = None  # in the recommended arithmetic, where it was asked for

    @property
    def ok(self) -> bool:
        """Whether the bundle can be used on this machine: as it was proven, and as it is recommended."""
        rows = {row.arithmetic.name: row for row in self.rows}
        as_proven = (rows[name].component(part).ok for part, name in self.proven.items())
        return bool(self.recommended) and all(as_proven) and (self.oracle is None or self.oracle.ok)

    def failures(self) -> list[str]:
        """A line for each reason why it is not `ok`."""
        lines = []
        for row in self.rows:
            used = [part for part, name in self.proven.items() if name == row.arithmetic.name]
            lines += [f"{self._line(row, part)}" for part in row.components if part.component in used and not part.ok]
        if not self.recommended:
            lines.append(f"{self.machine}: no arithmetic leaves a picture that passes")
        if self.oracle and not self.oracle.ok:
            lines.append(f"{self.machine}: {self.oracle.line}")
        return lines

    def misfits(self) -> list[str]:
        """A line for each part that fails in an arithmetic that is not proven: an app must not choose it there."""
        lines = []
        for row in self.rows:
            for part in row.components:
                if not part.ok and self.proven[part.component] != row.arithmetic.name:
                    lines.append(self._line(row, part))
            if not row.picture_ok:
                lines.append(f"{self.machine}, {row.arithmetic.name}: {row.verdict.removeprefix('FAILED: ')}")
        return lines

    def _line(self, row: ArithmeticRow, part: ComponentReport) -> str:
        return f"{self.machine}, {row.arithmetic.name}: {part.component}: {part.verdict}"

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "target": self.target,
            "runtime": self.runtime,
            "ok": self.ok,
            "proven_in": dict(self.proven),
            "recommended": dict(self.recommended) or None,
            "recommended_picture_db": None if self.recommended_db is None else finite_db(self.recommended_db),
            "probes": dict(self.probes or {}),
            "oracle": self.oracle.to_json() if self.oracle else None,
            "rows": [row.to_json() for row in self.rows],
            "failures": self.failures(),
            "misfits": self.misfits(),
        }


def machine_table(report: MachineReport) -> Table:
    """A line an arithmetic: dB of each component against PyTorch, the picture's PSNR, and the verdict."""
    from rich.markup import escape
    from rich.table import Table

    title = f"{report.target} {report.runtime} on {report.machine}: dB from PyTorch in float32"
    table = Table(title=title, title_justify="left")
    components = [part.component for part in report.rows[0].components] if report.rows else []
    for heading in ("arithmetic", "computes", *components, "picture", "verdict"):
        left = heading in ("arithmetic", "computes", "verdict")
        table.add_column(heading, justify="left" if left else "right")
    for row in report.rows:
        cells = [_cell(part) for part in row.components]
        picture = f"{row.picture.image.psnr_db:.1f}" if row.picture else "-"
        colour = "green" if row.ok and not row.falls_back else "yellow" if row.ok else "bold red"
        name = f"{row.arithmetic.name} *" if row.arithmetic.is_default else row.arithmetic.name
        table.add_row(name, row.computed, *cells, picture, f"[{colour}]{escape(row.verdict)}[/]")
    return table


def recommendation(report: MachineReport) -> str:
    """One line: the arithmetic, and the components that are kept in another."""
    if not report.recommended:
        return "recommended: none"
    names = list(report.recommended.values())
    main = max(dict.fromkeys(names), key=names.count)
    for denoiser in with_role("denoiser", report.recommended):
        main = report.recommended[denoiser]
    apart = [f"{part} in {name}" for part, name in report.recommended.items() if name != main]
    kept = f", but {', '.join(apart)}" if apart else ""
    picture = "no picture drawn" if report.recommended_db is None else f"picture {report.recommended_db:.1f} dB"
    return f"recommended: {main}{kept} ({picture})"


def _cell(part: ComponentReport) -> str:
    if part.problem or part.loss is None:
        return "not run" if part.problem.startswith("not run") else "died"
    said = "equal" if part.loss.snr_db == math.inf else f"{part.loss.snr_db:.1f}"
    return said if part.ok else f"{said} (!)"
