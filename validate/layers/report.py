"""What was found about a component's modules: which goes wrong first, which add most, which come near float16's end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ..tolerances import LAYER_TOLERANCE
from .advice import RuleAdvice
from .examine import Layer

if TYPE_CHECKING:
    from rich.table import Table

FLOAT16_MAX: Final = 65504.0
NEAR: Final = 1 / 8
"""Part of float16's largest number from which on an activation is near it: sums inside a module go further."""

SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Range:
    """How large a module's result gets in PyTorch, over all probes."""

    module: str
    op: str
    peak: float  # largest magnitude, in the tensor's own unit
    probe: str  # where

    @property
    def near(self) -> bool:
        return not self.peak < NEAR * FLOAT16_MAX


@dataclass(frozen=True, slots=True)
class ComponentLayers:
    """One component, module by module, in the order of execution."""

    component: str
    precision: str
    probe: str  # the inputs that it was run with: those with the worst result
    layers: tuple[Layer, ...]
    ranges: tuple[Range, ...]
    least_db: float  # what the whole component must reach
    partial_runs: int
    peak_mib: float
    whole_db: float | None = None  # the component in one undivided run; None if it gave no number
    run_mib: float = 0.0  # what such a run took at its peak; 0.0 where it is not known
    seconds: float = 0.0  # of the looking, PyTorch's part included
    rules: Mapping[str, RuleAdvice] = field(default_factory=dict)  # module -> the rule that gives it more bits

    @property
    def bad(self) -> tuple[Layer, ...]:
        """Modules whose own work is wrong, the first one first."""
        return tuple(layer for layer in self.layers if not layer.ok)

    @property
    def first_bad(self) -> Layer | None:
        return next(iter(self.bad), None)

    @property
    def left(self) -> Layer | None:
        """Where a run leaves the component's tolerance for good: all that follows is beyond it as well."""
        found = None
        for layer in reversed([layer for layer in self.layers if layer.carried_db is not None]):
            if layer.carried_db is None or layer.carried_db >= self.least_db:
                break
            found = layer
        return found

    def worst(self) -> tuple[Layer, ...]:
        """Those that are wrong in the order of execution; then the others, first what adds most error.

        In a model with fewer bits that is what rounding costs at each.
        """
        rest = [layer for layer in self.layers if layer not in self.bad]
        return (*self.bad, *sorted(rest, key=lambda layer: layer.made_db if layer.lost_db is None else layer.lost_db))

    def largest(self) -> tuple[Range, ...]:
        """The results that come nearest to float16's limit first."""
        return tuple(sorted(self.ranges, key=lambda each: -each.peak))

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {
                "component": self.component,
                "module": layer.module,
                "op": layer.op,
                "snr_db": layer.made_db,
                "carried_db": layer.carried_db,
                "lost_db": layer.lost_db,
                "max_abs": layer.max_abs,
                "needed_db": layer.needed_db,
                "ok": layer.ok,
                "tensor": layer.tensor,
                "problem": layer.problem or None,
                "rule": self.rules[layer.module].toml if layer.module in self.rules else None,
            }
            for layer in self.layers
        ]

    def first_bad_json(self) -> dict[str, Any] | None:
        layer = self.first_bad
        if layer is None:
            return None
        facts = {"component": self.component, "module": layer.module, "op": layer.op, "snr_db": layer.made_db}
        return {**facts, "carried_db": layer.carried_db, "problem": layer.problem or None, "try": remedy(self, layer)}

    def ranges_json(self) -> list[dict[str, Any]]:
        return [
            {"module": each.module, "op": each.op, "peak": each.peak, "of_fp16": each.peak / FLOAT16_MAX,
             "near": each.near, "probe": each.probe}
            for each in self.largest()
        ]  # fmt: skip

    def cost_json(self) -> dict[str, Any]:
        run = round(self.run_mib, 1) or None
        times = round(self.peak_mib / self.run_mib, 2) if self.run_mib else None
        return {"partial_runs": self.partial_runs, "peak_rss_mib": round(self.peak_mib, 1), "run_peak_rss_mib": run,
                "times_run": times, "seconds": round(self.seconds, 1), "probe": self.probe,
                "tolerance": LAYER_TOLERANCE.min_snr_db}  # fmt: skip


def layers_json(found: Sequence[ComponentLayers]) -> dict[str, Any]:
    """The keys of `validate --layers --json`."""
    return {
        "layers": [row for each in found for row in each.to_json()],
        "first_bad": next((bad for each in found if (bad := each.first_bad_json())), None),
        "ranges": {each.component: each.ranges_json() for each in found},
        "layers_measured": {each.component: each.cost_json() for each in found},
    }


def remedy(found: ComponentLayers, layer: Layer) -> str:
    """What to try about a module that computes something else than PyTorch does with the same inputs and weights."""
    if "NaN" in layer.problem or "infinite" in layer.problem or layer.made_db < -300:
        return f"its values overflow or its weights are damaged: run `diffusette verify`, then {_keep(found, layer)}"
    if layer.problem:
        return "it gives another shape: convert again, and report this"
    if layer.made_db < 45:
        return "its weights, or the way they are laid out, are not the checkpoint's: verify, then convert again"
    return "its operator computes less exactly here, or with another constant: compare another target, and report this"


def _keep(found: ComponentLayers, layer: Layer) -> str:
    rule = found.rules.get(layer.module)
    if rule is None:
        return "convert again"
    return f"convert with a rule: match = '{rule.match}', scheme = \"{rule.scheme}\""


def layers_table(found: ComponentLayers) -> Table:
    """A component for the terminal: what is wrong, else what adds most."""
    from rich.table import Table

    bad = {id(layer) for layer in found.bad}
    title = f"{found.component}, module by module"
    table = Table(title=title, title_justify="left", caption=_caption(found), caption_justify="left")
    table.add_column("module", no_wrap=True)
    table.add_column("is a")
    fewer_bits = any(layer.lost_db is not None for layer in found.layers)
    for heading in ("made here dB", "carried dB", *(["lost by bits dB"] if fewer_bits else [])):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for layer in found.worst()[:SHOWN]:
        wrong = id(layer) in bad
        lost = [_db(layer.lost_db)] if fewer_bits else []
        verdict = f"[bold red]{'first wrong' if layer is found.first_bad else 'wrong'}[/]" if wrong else "[green]ok[/]"
        table.add_row(layer.module, layer.op, _db(layer.made_db), _db(layer.carried_db), *lost, verdict)
    return table


def ranges_table(found: Sequence[ComponentLayers]) -> Table:
    """The largest activations of each component, next to float16's limit."""
    from rich.table import Table

    table = Table(
        title="largest activations in PyTorch, over all probes",
        title_justify="left",
        caption=f"float16 ends at {FLOAT16_MAX:g}; sums inside of a module go further than its result",
        caption_justify="left",
    )
    table.add_column("component")
    table.add_column("module", no_wrap=True)
    table.add_column("peak", justify="right")
    table.add_column("of float16's limit", justify="right")
    for each in found:
        near = [entry for entry in each.largest() if entry.near]
        for entry in (near or each.largest()[:2])[:SHOWN]:
            share = f"{100 * entry.peak / FLOAT16_MAX:.2g} %"
            colour = "bold red" if entry.near else "green"
            table.add_row(each.component, entry.module, f"{entry.peak:.4g}", f"[{colour}]{share}[/]")
    return table


def _caption(found: ComponentLayers) -> str:
    limits = sorted({layer.needed_db for layer in found.layers}, reverse=True)
    limit = " or ".join(f"{each:g}" for each in limits)
    rounding = ", those that round their input" if len(limits) > 1 else ""
    lines = []
    if first := found.first_bad:
        lines.append(f"First wrong: {found.component}/{first.module}: {remedy(found, first)}.")
    else:
        lines.append(f"No module is wrong by itself: each reaches {limit} dB{rounding}, fed with PyTorch's inputs.")
        if found.whole_db is not None and found.whole_db < found.least_db:
            lines.append(f"The whole component reaches {found.whole_db:.1f} of {found.least_db:g} dB.")
            if found.left is None:
                lines.append("It does so only in one piece: the runtime joins operations across modules wrongly.")
    if left := found.left:
        lines.append(f"A run leaves {found.least_db:g} dB at {left.module} ({left.op}).")
    whole = f" (an undivided run: {found.run_mib:.0f} MiB)" if found.run_mib else ""
    lines.append(f"{found.partial_runs} partial runs, {found.peak_mib:.0f} MiB{whole}, {found.seconds:.0f} s.")
    return "\n".join(lines)


def _db(value: float | None) -> str:
    if value is None:
        return "-"
    return "equal" if value >= 999 else "none" if value <= -999 else f"{value:.1f}"
