"""What `compare` found about two bundles, as facts: for JSON, for a table, for the exit code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .parity import Parity, finite_db
from .report import ImageReport
from .tolerances import Tolerance

if TYPE_CHECKING:
    from rich.table import Table

    from .speed.latency import ComponentProfile


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two bundles."""

    label: str  # tells it from the other: "ncnn", or "out/before" where both are for one runtime
    name: str
    target: str
    version: str
    precision: Mapping[str, str]  # by component
    bytes: Mapping[str, int]  # by component

    def to_json(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "name": self.name,
            "target": self.target,
            "version": self.version,
            "precision": dict(self.precision),
            "bytes": dict(self.bytes),
        }


@dataclass(frozen=True, slots=True)
class Contrast:
    """One component of both on the same feeds; the first bundle's answer is the reference."""

    component: str
    parity: Parity | None
    limit: Tolerance | None  # None: the bundles were made from different checkpoints, nothing is promised
    worst_probe: str = ""
    probes: int = 0
    problem: str = ""

    @property
    def ok(self) -> bool:
        if self.problem or self.parity is None:
            return False
        return self.limit is None or self.parity.snr_db >= self.limit.min_snr_db

    def to_json(self) -> dict[str, Any]:
        measured = self.parity.to_json() if self.parity else dict.fromkeys(("max_abs", "snr_db", "psnr_db", "cosine"))
        return {
            **measured,
            "ok": self.ok,
            "tolerance": finite_db(self.limit.min_snr_db) if self.limit else None,
            "why": self.limit.why if self.limit else None,
            "probes": self.probes,
            "worst_probe": self.worst_probe,
            "problem": self.problem or None,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two bundles beside each other. Components stand with the most different first."""

    first: Side
    second: Side
    components: tuple[Contrast, ...]
    alone: tuple[str, ...]  # "vae_encoder only in ncnn": what could not be compared
    image: ImageReport | None
    speed: Mapping[str, tuple[ComponentProfile, ComponentProfile]]  # empty: not measured
    differences: tuple[tuple[str, str, str], ...]  # what, in the first, in the second
    gated: bool  # False: different checkpoints
    busy: float | None = None  # load average while timing, if the machine had other work

    @property
    def ok(self) -> bool:
        if any(part.problem for part in self.components) or (self.image and self.image.problem):
            return False
        image = self.image is None or not self.gated or self.image.ok
        return bool(self.components) and image and all(part.ok for part in self.components)

    def failures(self) -> list[str]:
        """A line for each part that lies further apart than two sound bundles can."""
        lines = []
        for part in self.components:
            if not part.ok:
                limit = part.limit.min_snr_db if part.limit else 0.0
                found = (
                    f"{part.parity.snr_db:.1f} dB apart, {limit:g} dB needed, at {part.worst_probe}"
                    if part.parity
                    else ""
                )
                lines.append(f"{part.component}: {part.problem or found}")
        if self.image and not self.image.ok and (self.gated or self.image.problem):
            lines.append(f"picture: {self.image.verdict}")
        return lines

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "gated": self.gated,
            "a": self.first.to_json(),
            "b": self.second.to_json(),
            "components": {part.component: part.to_json() for part in self.components},
            "alone": list(self.alone),
            "image": self.image.to_json() if self.image else None,
            "speed": {
                name: {"a": a.to_json(), "b": b.to_json(), "ratio_b_to_a": round(_ratio(a, b), 4)}
                for name, (a, b) in self.speed.items()
            },
            "busy": self.busy,
            "differences": [{"what": what, "a": a, "b": b} for what, a, b in self.differences],
            "failures": self.failures(),
        }


def _ratio(a: ComponentProfile, b: ComponentProfile) -> float:
    return b.timing.median_ms / a.timing.median_ms


def contrast_table(found: Comparison) -> Table:
    """For a terminal: a line a component, the most different first, then the pictures."""
    from rich.markup import escape
    from rich.table import Table

    a, b = found.first, found.second
    table = Table(title=f"{escape(a.label)} (A) and {escape(b.label)} (B)", title_justify="left")
    for heading in ("", "A", "B", "SNR dB", "needed", "MB A", "MB B", "ms A", "ms B", "B / A", "MiB A", "MiB B"):
        table.add_column(heading, justify="left" if heading in ("", "A", "B") else "right")
    for part in found.components:
        name = part.component
        times = found.speed.get(name)
        colour = "green" if part.ok else "bold red"
        table.add_row(
            name,
            a.precision[name],
            b.precision[name],
            f"[{colour}]{_db(part.parity.snr_db) if part.parity else escape(part.problem)}[/]",
            f"{part.limit.min_snr_db:.1f}" if part.limit else "-",
            *(f"{side.bytes[name] / 1e6:.2f}" for side in (a, b)),
            *(f"{time.timing.median_ms:.2f}" for time in times or ()),
            *([f"{_ratio(*times):.2f}x"] if times else ["-"] * 3),
            *(f"{time.timing.memory.peak_mib:.0f}" for time in times or ()),
            *(() if times else ("-", "-")),
        )
    if image := found.image:
        table.add_section()
        wanted = f"{image.tolerance.min_psnr_db:.1f}" if found.gated else "-"
        table.add_row(f"picture, {image.steps} steps", "", "", f"{_db(image.psnr_db)} PSNR", wanted)
    return table


def _db(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.1f}"
