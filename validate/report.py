"""What validation found, as facts: for JSON, for tables, and for the exit code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .error_histogram import Spread
from .layers.report import ComponentLayers, layers_json
from .parity import Parity, finite_db
from .timesteps.curve import TimestepCurve
from .tolerances import ImageTolerance, Tolerance

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class ComponentReport:
    """One component over all its probes. Either `loss` or `problem` says what became of it."""

    component: str
    precision: str
    tolerance: Tolerance
    loss: Parity | None  # against PyTorch in float32, the worst over all probes
    worst_probe: str = ""
    probes: int = 0
    fidelity: Parity | None = None  # against PyTorch with equally rounded weights
    fidelity_tolerance: Tolerance | None = None
    problem: str = ""  # why the component gave no comparable answer at all
    form: str = ""  # which form of the model this is about, where it has several: the worst one
    run_peak_mib: float = 0.0  # of the process that ran it; 0.0 where it had none of its own

    @property
    def margin_db(self) -> float:
        """How far the worse of the two gates is from failing; negative when one failed."""
        if self.problem or self.loss is None:
            return -math.inf
        margin = self.loss.snr_db - self.tolerance.min_snr_db
        if self.fidelity_tolerance is None:
            return margin
        if self.fidelity is None:
            return -math.inf
        return min(margin, self.fidelity.snr_db - self.fidelity_tolerance.min_snr_db)

    @property
    def ok(self) -> bool:
        return self.margin_db >= 0

    @property
    def verdict(self) -> str:
        """One line for people."""
        if self.problem or self.loss is None:
            return self.problem
        if self.loss.snr_db < self.tolerance.min_snr_db:
            needed = self.tolerance.min_snr_db
            said = f"{self.loss.snr_db:.1f} dB from PyTorch, {needed:g} dB needed, at {self.worst_probe}"
            same = (
                self.fidelity and self.fidelity_tolerance and self.fidelity.snr_db >= self.fidelity_tolerance.min_snr_db
            )
            return f"{said}; so is PyTorch with the same weights: this checkpoint needs more bits" if same else said
        if self.fidelity_tolerance and not self.ok:
            got = f"{self.fidelity.snr_db:.1f} dB" if self.fidelity else "nothing"
            return (
                f"{got} from PyTorch with weights rounded to {self.precision}, "
                f"{self.fidelity_tolerance.min_snr_db:g} dB needed: rounding does not explain it"
            )
        return "ok"

    def to_json(self) -> dict[str, Any]:
        loss = self.loss.to_json() if self.loss else dict.fromkeys(("max_abs", "snr_db", "psnr_db", "cosine"))
        facts: dict[str, Any] = {
            **loss,
            "ok": self.ok,
            "tolerance": self.tolerance.min_snr_db,
            "why": self.tolerance.why,
            "precision": self.precision,
            "probes": self.probes,
            "worst_probe": self.worst_probe,
            "fidelity": None,
            "problem": self.problem or None,
            "form": self.form or None,
        }
        if self.fidelity_tolerance:
            measured = self.fidelity.to_json() if self.fidelity else {}
            wanted = self.fidelity_tolerance
            facts["fidelity"] = {**measured, "tolerance": wanted.min_snr_db, "why": wanted.why}
        return facts


@dataclass(frozen=True, slots=True)
class PictureReport:
    """One picture after the full schedule, from the same starting noise as PyTorch's."""

    prompt: str
    seed: int
    latents: Parity
    image: Parity  # peak 1.0, before rounding to 8 bits
    ssim: float  # Wang et al. 2004, -1..1, of the float pictures
    drift_db: tuple[float, ...]  # SNR of the latents after each step, finite
    spread: Spread

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "psnr_db": finite_db(self.image.psnr_db),
            "max_abs": self.image.max_abs,
            "ssim": self.ssim,
            "latents_snr_db": finite_db(self.latents.snr_db),
            "drift_db": list(self.drift_db),
            "histogram": self.spread.to_json(),
        }


@dataclass(frozen=True, slots=True)
class ImageReport:
    """All pictures; the verdict is the worst one's."""

    pictures: tuple[PictureReport, ...]
    tolerance: ImageTolerance
    steps: int
    guidance: float
    scheduler: str = ""  # empty: the checkpoint's own
    problem: str = ""
    rounded_db: float | None = None  # worst PSNR of PyTorch's own with the same weights, where it was asked for

    @property
    def drift_db(self) -> tuple[float, ...]:
        """SNR of the latents after each step, of the picture that is worst at that step."""
        return tuple(min(step) for step in zip(*(picture.drift_db for picture in self.pictures), strict=True))

    @property
    def psnr_db(self) -> float:
        return min((picture.image.psnr_db for picture in self.pictures), default=-math.inf)

    @property
    def needed_db(self) -> float:
        """The least that passes: the tolerance, or what rounding leaves this checkpoint, where that is less."""
        limit = self.tolerance
        if self.rounded_db is None or limit.floor_db is None:
            return limit.min_psnr_db
        return min(limit.min_psnr_db, max(limit.floor_db, self.rounded_db - limit.slack_db))

    @property
    def ok(self) -> bool:
        return not self.problem and self.psnr_db >= self.needed_db

    @property
    def verdict(self) -> str:
        if self.problem:
            return self.problem
        said = "ok" if self.ok else f"{self.psnr_db:.1f} dB PSNR, {self.needed_db:.3g} dB needed"
        if self.rounded_db is None:
            return said
        said += f"; PyTorch with the same weights has {self.rounded_db:.1f}"
        if not self.ok and self.psnr_db >= self.rounded_db - self.tolerance.slack_db:
            said += ": this checkpoint needs more bits"
        return said

    def to_json(self) -> dict[str, Any]:
        pictures = self.pictures
        return {
            "psnr_db": finite_db(self.psnr_db) if pictures else None,
            "ssim": min((picture.ssim for picture in pictures), default=None),
            "latents_snr_db": min((finite_db(picture.latents.snr_db) for picture in pictures), default=None),
            "ok": self.ok,
            "tolerance": self.needed_db,
            "why": self.tolerance.why,
            "rounded_psnr_db": self.rounded_db,
            "steps": self.steps,
            "guidance": self.guidance,
            "scheduler": self.scheduler or None,
            "problem": self.problem or None,
            "drift_db": list(self.drift_db),
            "pictures": [picture.to_json() for picture in sorted(pictures, key=lambda each: each.image.psnr_db)],
        }


@dataclass(frozen=True, slots=True)
class OracleReport:
    """Percent of pictures that show what their caption states; for the embedded demo checkpoint only."""

    score: float
    reference_score: float  # PyTorch's pictures, same captions and noise
    pictures: int
    max_difference: float  # points that the score may lie below PyTorch's

    @property
    def ok(self) -> bool:
        return self.reference_score - self.score <= self.max_difference

    @property
    def line(self) -> str:
        """Both scores, for people."""
        return f"oracle: {self.score:.1f} % of {self.pictures} captions right, PyTorch {self.reference_score:.1f} %"

    def to_json(self) -> dict[str, Any]:
        return {
            "score": self.score,
            "reference_score": self.reference_score,
            "pictures": self.pictures,
            "ok": self.ok,
            "tolerance": self.max_difference,
        }


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The verdict on a bundle. Components stand worst first."""

    target: str
    components: tuple[ComponentReport, ...]
    image: ImageReport | None = None
    oracle: OracleReport | None = None
    layers: tuple[ComponentLayers, ...] = ()  # where it was asked for
    timesteps: TimestepCurve | None = None  # of the UNet, where it was asked for

    @property
    def ok(self) -> bool:
        rest = [part.ok for part in (self.image, self.timesteps, self.oracle) if part is not None]
        return bool(self.components) and all(component.ok for component in self.components) and all(rest)

    def failures(self) -> list[str]:
        """A line for each part that failed, worst component first; empty when `ok`."""
        lines = [f"{part.component}: {part.verdict}" for part in self.components if not part.ok]
        if not self.components:
            lines.append("no component was compared")
        if self.image and not self.image.ok:
            lines.append(f"picture: {self.image.verdict}")
        if self.timesteps and not self.timesteps.ok:
            lines.append(self.timesteps.line)
        if self.oracle and not self.oracle.ok:
            lines.append(self.oracle.line)
        return lines

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "target": self.target,
            "components": {part.component: part.to_json() for part in self.components},
            **layers_json(self.layers),
            "image": self.image.to_json() if self.image else None,
            "timesteps": self.timesteps.to_json() if self.timesteps else None,
            "oracle": self.oracle.to_json() if self.oracle else None,
            "failures": self.failures(),
        }


def parity_table(report: ParityReport) -> Table:
    """The report for a terminal: a line a component, worst first, then the pictures."""
    from rich.table import Table

    table = Table(title=f"{report.target} against PyTorch", title_justify="left")
    for heading in ("", "precision", "max abs", "SNR dB", "needed", "same weights dB", "needed", "verdict"):
        table.add_column(heading, justify="left" if heading in ("", "precision", "verdict") else "right")
    for part in report.components:
        loss, fidelity, wanted = part.loss, part.fidelity, part.fidelity_tolerance
        table.add_row(
            f"{part.component} (.{part.form})" if part.form else part.component,
            part.precision,
            f"{loss.max_abs:.2e}" if loss else "-",
            _db(loss.snr_db) if loss else "-",
            f"{part.tolerance.min_snr_db:g}",
            _db(fidelity.snr_db) if fidelity else "-",
            f"{wanted.min_snr_db:g}" if wanted else "-",
            _coloured(part.ok, part.verdict),
        )
    if image := report.image:
        worst = min(image.pictures, key=lambda picture: picture.image.psnr_db, default=None)
        table.add_section()
        table.add_row(
            f"picture, {image.steps} steps",
            "",
            f"{worst.image.max_abs:.2e}" if worst else "-",
            f"{_db(image.psnr_db)} PSNR" if worst else "-",
            f"{image.needed_db:.3g}",
            "-",
            "-",
            _coloured(image.ok, image.verdict),
        )
        if worst:
            table.add_row("", "", "", f"{min(each.ssim for each in image.pictures):.5f} SSIM", "-", "-", "-", "")
    if oracle := report.oracle:
        verdict = f"PyTorch {oracle.reference_score:.1f} %, {oracle.pictures} captions"
        row = ("oracle", "", "", f"{oracle.score:.1f} %", f"within {oracle.max_difference:g}", "", "")
        table.add_row(*row, _coloured(oracle.ok, verdict))
    return table


def _db(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.1f}"


def _coloured(ok: bool, words: str) -> str:
    from rich.markup import escape

    return f"[{'green' if ok else 'bold red'}]{escape(words)}[/]"
