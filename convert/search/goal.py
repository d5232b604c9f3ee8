"""What a search is asked for, and what it answers: a goal, a menu, and the recipe that was chosen from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, Final

from ...stages.errors import UsageError

if TYPE_CHECKING:
    from ...quantize.plan import Plan
    from ..recipe import Recipe


_TOO_LITTLE: Final = {
    "--bits": "leaves nothing",
    "--budget": "leaves nothing",
    "--min-snr": "allows errors as large as the answers",
}
_EXAMPLES: Final = {"--bits": "--bits 4.5", "--budget": "--budget 300MB", "--min-snr": "--min-snr 40"}


@dataclass(frozen=True, slots=True)
class Goal:
    """What the user asked for; exactly one of the three."""

    bits: float | None = None  # a weight, over all components, scales and biases included
    budget: int | None = None  # bytes of all weights, in one form
    min_snr: float | None = None  # dB, of every component

    def __post_init__(self) -> None:
        given = [value for value in (self.bits, self.budget, self.min_snr) if value is not None]
        if len(given) != 1:
            raise UsageError("--bits, --budget and --min-snr exclude each other", hint="choose one of them")
        if not 0 < given[0] < inf:
            name = "--bits" if self.bits is not None else "--budget" if self.budget is not None else "--min-snr"
            why = "is not a number that can be reached" if given[0] > 0 or given[0] != given[0] else _TOO_LITTLE[name]
            raise UsageError(f"{name} {given[0]:g} {why}", hint=f"for example {_EXAMPLES[name]}")

    def __str__(self) -> str:
        if self.bits is not None:
            return f"--bits {self.bits:g}"
        if self.budget is not None:
            unit, size = next(each for each in (("MB", 10**6), ("kB", 10**3), ("B", 1)) if 10 * self.budget >= each[1])
            return f"--budget {self.budget / size:g}{unit}"
        return f"--min-snr {self.min_snr:g}"


@dataclass(frozen=True, slots=True)
class MenuRow:
    """One mixture on the frontier: what it costs in PyTorch with its weights rounded."""

    bits: float  # a weight
    bytes: int
    snr_db: Mapping[str, float]  # component -> over its calibration samples
    psnr_db: float | None  # of pictures, the median; None where drawing takes too long
    chosen: bool
    measured: bool = True  # else `snr_db` is what the losses of layers add up to
    unet_ms: Mapping[str, float] = field(default_factory=dict)  # target -> a call there, where it was measured
    plans: Mapping[str, Plan] = field(default_factory=dict)  # component -> its own, where GPTQ has rounded it
    # component -> SNR before and after its scales were fitted, over calls that nothing was fitted to
    held_out_db: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "bits_per_weight": round(self.bits, 3),
            "bytes": self.bytes,
            "snr_db": {part: round(value, 2) for part, value in self.snr_db.items()},
            "image_psnr_db": None if self.psnr_db is None else round(self.psnr_db, 2),
            "measured": self.measured,
            "unet_ms": {target: round(value, 2) for target, value in self.unet_ms.items()},
            "chosen": self.chosen,
            **({"held_out_db": _rounded(self.held_out_db)} if self.held_out_db else {}),
        }


def _rounded(pairs: Mapping[str, tuple[float, float]]) -> dict[str, list[float]]:
    return {part: [round(value, 2) for value in pair] for part, pair in pairs.items()}


@dataclass(frozen=True, slots=True)
class Found:
    """What a search led to: an ordinary recipe, and the menu that it was chosen from."""

    goal: Goal
    target: str  # for people: several may share a search
    recipe: Recipe
    menu: tuple[MenuRow, ...]  # fewest bits first
    schemes: tuple[str, ...]  # of integers, that every layer was rounded at
    tuned: MenuRow | None = None  # the chosen row with its scales fitted, as it is built; None: it is built as it is
    files: tuple[str, ...] = ()  # paths of the recipe and the plot, once written

    def to_json(self) -> dict[str, Any]:
        return {
            "goal": str(self.goal),
            "menu": [row.to_json() for row in self.menu],
            "tuned": self.tuned.to_json() if self.tuned else None,
            "files": list(self.files),
        }
