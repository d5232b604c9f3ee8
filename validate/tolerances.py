"""The one table of tolerances, each with its reason. A combination that is not in it cannot be gated.

Two gates hold for every component. `loss` compares with PyTorch in float32: what did the conversion cost?
`fidelity` compares with PyTorch whose weights were rounded the same way: the arithmetic left over must be nearly
as exact as at fp32. The second catches damage that hides below the rounding loss. docs/parity.md says how the
numbers were chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from ..pipeline.errors import UsageError

Gate = Literal["loss", "fidelity"]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The least signal-to-noise ratio that passes, in dB, and why it is that one."""

    min_snr_db: float
    why: str


@dataclass(frozen=True, slots=True)
class ImageTolerance:
    """The least PSNR of the final picture, in dB with peak 1.0, and why it is that one."""

    min_psnr_db: float
    why: str


_SUMMATION = "float32 arithmetic: only the order of sums and the polynomials of exp and erf differ from PyTorch's"
_HALF = "weights of two or more dimensions keep 11 significant bits"
_SAME_WEIGHTS = "PyTorch ran with the same rounded weights, so only float32 arithmetic differs"

TOLERANCES: Final[dict[tuple[Gate, str, str, str], Tolerance]] = {
    # gate, component, target, precision; "*" stands for any
    ("loss", "*", "ort", "fp32"): Tolerance(100.0, _SUMMATION),
    ("loss", "*", "ncnn", "fp32"): Tolerance(100.0, _SUMMATION),
    ("loss", "*", "mnn", "fp32"): Tolerance(80.0, f"{_SUMMATION}; MNN's are the coarsest of the three"),
    ("loss", "*", "example", "fp32"): Tolerance(100.0, _SUMMATION),
    ("loss", "*", "*", "fp16"): Tolerance(45.0, _HALF),
    ("fidelity", "*", "ort", "fp16"): Tolerance(95.0, _SAME_WEIGHTS),
    ("fidelity", "*", "ncnn", "fp16"): Tolerance(95.0, _SAME_WEIGHTS),
    ("fidelity", "*", "mnn", "fp16"): Tolerance(75.0, f"{_SAME_WEIGHTS}; MNN's is the coarsest of the three"),
    ("fidelity", "*", "example", "fp16"): Tolerance(95.0, _SAME_WEIGHTS),
}

IMAGE_TOLERANCES: Final[dict[tuple[str, str], ImageTolerance]] = {
    # target, precision
    ("*", "fp32"): ImageTolerance(70.0, "20 steps with guidance 4 amplify float32's rounding by some 30 dB, not more"),
    ("*", "fp16"): ImageTolerance(55.0, "rounding the weights to fp16 inside PyTorch alone leaves 82 dB on the demo"),
}


def tolerance(gate: Gate, component: str, target: str, precision: str) -> Tolerance:
    """The table's row for this model; an exact row goes before a wildcard, a component before a target.

    Raises:
        UsageError: no row covers it.
    """
    for row in ((component, target), (component, "*"), ("*", target), ("*", "*")):
        if found := TOLERANCES.get((gate, *row, precision)):
            return found
    raise _unknown(f"{gate} tolerance for {component} on {target} at {precision}")


def image_tolerance(target: str, precision: str) -> ImageTolerance:
    """The picture's tolerance; `precision` is the coarsest of the bundle's components.

    Raises:
        UsageError: no row covers it.
    """
    for row in (target, "*"):
        if found := IMAGE_TOLERANCES.get((row, precision)):
            return found
    raise _unknown(f"image tolerance on {target} at {precision}")


def _unknown(what: str) -> UsageError:
    return UsageError(
        f"no {what} is written down, so nothing can be gated",
        hint="add a row with its reason to validate/tolerances.py",
    )
