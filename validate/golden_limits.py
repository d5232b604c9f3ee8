"""How far a replay may lie from a bundle's golden vectors, and why.

What a port computes itself is held to float32's rounding, in every arithmetic: the models' answers are taken from the
goldens for that. What its models compute is held to a limit of the arithmetic they compute in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from ..pipeline.strict import Strict
from ..quantize.scheme import parse_scheme
from ..runtimes.arithmetic import Arithmetic, Computed


class ArithmeticLimits(Strict):
    """How far what models compute may lie from the goldens: at least, in dB, and at most, in levels of 255."""

    snr_db: float
    image_max_levels: float


class Limits(Strict):
    """All limits of a goldens.json; `PORT_LIMITS` and `GOLDEN_LIMITS` have the reasons."""

    noise_max_abs: float
    port_snr_db: float
    time_max_abs: float
    pixels_max_levels: float
    differing_bytes: float
    arithmetics: dict[str, ArithmeticLimits]  # by the names that the target has for them


PORT_LIMITS: Final[dict[str, tuple[float, str]]] = {
    "noise_max_abs": (
        1e-5,
        "torch's own logarithm and sine differ from exact ones by 3e-6; another stream by 1 and more",
    ),
    "port_snr_db": (
        110.0,
        "another order of the same float32 sums leaves 130 dB and more after 20 steps, the best-hidden mistake 75",
    ),
    "time_max_abs": (
        2e-3,
        "angles of up to 7500 are rounded to float32, by 5e-4; a timestep that is off by one moves a sine by 0.8",
    ),
    "pixels_max_levels": (1e-3, "float32 rounds 255 levels to 3e-5; a factor that is 0.1 % off moves white by 0.13"),
    "differing_bytes": (
        0.02,
        "a pixel on the border between two levels may fall to either; cutting off instead of rounding moves half",
    ),
}
"""Of what a port computes itself; the names are those in goldens.json."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Limits of what models compute in one arithmetic: worst of all steps and single answers, and the picture."""

    snr_db: float
    image_max_levels: float
    why: str

    @property
    def limits(self) -> ArithmeticLimits:
        return ArithmeticLimits(snr_db=self.snr_db, image_max_levels=self.image_max_levels)


GOLDEN_LIMITS: Final[dict[tuple[Computed, bool], Floor]] = {
    ("float32", False): Floor(
        90.0,
        0.1,
        "other runtimes and processors leave 105 dB and more, and 0.0006 levels; guidance that is 0.1 % off 74.7 dB",
    ),
    ("float16 stored", False): Floor(50.0, 1.0, "TODO"),
    ("float16", False): Floor(34.0, 4.0, "TODO"),
    ("bfloat16 stored", False): Floor(32.0, 4.0, "TODO"),
    ("bfloat16", False): Floor(32.0, 4.0, "TODO"),
    ("float32", True): Floor(20.0, 34.0, "TODO"),
    ("float16 stored", True): Floor(20.0, 34.0, "TODO"),
    ("float16", True): Floor(20.0, 34.0, "TODO"),
    ("bfloat16 stored", True): Floor(20.0, 34.0, "TODO"),
    ("bfloat16", True): Floor(20.0, 34.0, "TODO"),
}
"""By what the arithmetic computes, and by whether activations are rounded to 8 bits: a last bit that differs moves
some of them by a whole code, so that no two processors agree."""


def golden_floor(computed: Computed, rounds: bool) -> Floor:
    """The row of the table."""
    return GOLDEN_LIMITS[computed, rounds]


def limits_of(arithmetics: Iterable[Arithmetic], precisions: Iterable[str]) -> dict[str, ArithmeticLimits]:
    """The limits of a bundle in each arithmetic of its target.

    Args:
        precisions: of its components.
    """
    rounds = any(parse_scheme(name).activation_bits == 8 for label in precisions for name in label.split("+"))
    return {each.name: golden_floor(each.expects, rounds).limits for each in arithmetics}


def new_limits(arithmetics: Mapping[str, ArithmeticLimits]) -> Limits:
    """What is written into new goldens."""
    return Limits(**{name: value for name, (value, _) in PORT_LIMITS.items()}, arithmetics=dict(arithmetics))


def loosest(limits: Iterable[ArithmeticLimits]) -> ArithmeticLimits:
    """Of models that compute in several arithmetics: the coarsest decides."""
    every = list(limits)
    return ArithmeticLimits(
        snr_db=min(each.snr_db for each in every), image_max_levels=max(each.image_max_levels for each in every)
    )
