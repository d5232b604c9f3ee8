"""How far a replay may lie from a bundle's golden vectors, and why.

What a port computes itself is held to float32's rounding, in every arithmetic: the models' answers are taken from the
goldens for that. What its models compute is held to a limit of the arithmetic they compute in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from ...quantize.scheme import parse_scheme
from ...runtimes.arithmetic import Arithmetic, Computed
from ...stages.strict import Strict


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
        100.0,
        "other orders of the same sums leave 123 dB and more after 20 steps of the demo, the best-hidden mistake 65",
    ),
    "time_max_abs": (
        2e-3,
        "sines all in float32 differ by 4e-6, those of a guidance of 7.5, whose angles reach 6500, by up to 5e-4; "
        "a timestep that is off by one moves one by 0.8",
    ),
    "pixels_max_levels": (1e-3, "float32 rounds 255 levels to 3e-5; pixels that are 0.1 % too bright differ by 0.2"),
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


# Measured on the demo, 20 steps of DDIM at guidance 4, against goldens made on x86: the worst step, and the picture.
# docs/goldens.md has the rows. At least 6 dB of slack, which is twice the levels: runtimes get other kernels.
_ROUNDED = (
    "a last bit that differs moves some activations by a whole code of 8 bits, so that no two processors agree: "
    "26.1 dB and 17 levels in float32 on AArch64, 26.4 and 21 in float16 and bfloat16"
)

GOLDEN_LIMITS: Final[dict[tuple[Computed, bool], Floor]] = {
    ("float32", False): Floor(
        90.0,
        0.1,
        "other runtimes and processors leave 102 dB and more, and 0.0025 levels; guidance that is 0.1 % off 74.7 dB",
    ),
    ("float16 stored", False): Floor(50.0, 0.5, "58.0 dB and 0.22 levels on AArch64"),
    ("float16", False): Floor(34.0, 5.0, "40.9 dB and 2.1 levels on AArch64"),
    ("bfloat16 stored", False): Floor(34.0, 8.0, "40.3 dB and 4.0 levels"),
    ("bfloat16", False): Floor(34.0, 8.0, "as where results are stored in it, which loses more"),
    **{
        (computed, True): Floor(20.0, 42.0, _ROUNDED)
        for computed in ("float32", "float16 stored", "float16", "bfloat16 stored", "bfloat16")
    },
}
"""By what the arithmetic computes, and by whether activations are rounded to 8 bits."""


def limits_of(arithmetics: Iterable[Arithmetic], precisions: Iterable[str]) -> dict[str, ArithmeticLimits]:
    """The limits of a bundle in each arithmetic of its target.

    Args:
        precisions: of its components.
    """
    bits = {parse_scheme(name).activation_bits for label in precisions for name in label.split("+")}

    def floor(each: Arithmetic) -> Floor:
        # a graph that rounds to float16 itself computes in it, where the processor can, whatever an app asks for
        computed: Computed = "float16" if each.expects == "float32" and 16 in bits else each.expects
        return GOLDEN_LIMITS[computed, 8 in bits]

    return {each.name: floor(each).limits for each in arithmetics}


def new_limits(arithmetics: Mapping[str, ArithmeticLimits]) -> Limits:
    """What is written into new goldens."""
    return Limits(**{name: value for name, (value, _) in PORT_LIMITS.items()}, arithmetics=dict(arithmetics))


def loosest(limits: Iterable[ArithmeticLimits]) -> ArithmeticLimits:
    """Of models that compute in several arithmetics: the coarsest decides."""
    every = list(limits)
    return ArithmeticLimits(
        snr_db=min(each.snr_db for each in every), image_max_levels=max(each.image_max_levels for each in every)
    )
