"""What a model may lose when a runtime computes in fewer bits than float32, beside what its scheme loses.

Rounding of weights and rounding of arithmetic are independent, so their noise powers add: a floor for both together
lies below either. Fidelity, which compares with PyTorch on equally rounded weights, sees the arithmetic alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from ...quantize.scheme import parse_scheme
from ...runtimes.arithmetic import CPU, VULKAN, Computed, Device
from ...stages.artifacts import role_of
from ..tolerances import AUTO_IMAGE_DB, ImageTolerance, Tolerance, coarsest_scheme, image_tolerance, tolerance


@dataclass(frozen=True, slots=True)
class ArithmeticFloor:
    """The least SNR of a component, and the least PSNR of a picture, in dB, that one arithmetic may leave."""

    component_db: float
    last_step_db: float  # of the UNet, whose answer at t = 1 is a thousandth of its input: that input's own rounding
    picture_db: float
    why: str

    def of(self, component: str) -> float:
        """The floor for one component."""
        return self.last_step_db if role_of(component) == "denoiser" else self.component_db


# Measured on the demo, AArch64, worst of all probes: float16 stored 58 dB and more, float16 arithmetic 45 and more with
# the layers that are kept in float32, bfloat16 38 and more. docs/measurements.md has the table.
FLOORS: Final[dict[Computed, ArithmeticFloor]] = {
    "float16 stored": ArithmeticFloor(
        50.0, 42.0, 45.0, "each layer's result keeps 11 significant bits: the demo keeps 58 dB and more"
    ),
    "float16": ArithmeticFloor(
        45.0,
        33.0,
        AUTO_IMAGE_DB,
        "sums are rounded to 11 significant bits too; at 40 dB a picture differs by 2.5 grey levels",
    ),
    "bfloat16 stored": ArithmeticFloor(
        35.0, 24.0, AUTO_IMAGE_DB, "each layer's result keeps 8 significant bits: the demo keeps 38 dB and more"
    ),
    "bfloat16": ArithmeticFloor(35.0, 24.0, AUTO_IMAGE_DB, "factors keep 8 significant bits, sums are float32"),
}


GPU_FLOAT32: Final = ArithmeticFloor(
    75.0, 75.0, 75.0, "a GPU's exponentials and quotients are coarser: ncnn's Vulkan leaves 80 dB and more on lavapipe"
)


def floor_of(precision: str, expects: Computed, device: Device) -> ArithmeticFloor | None:
    """The floor beside the scheme's own, or None: in float32, and where the scheme itself computes in float16."""
    if parse_scheme(coarsest_scheme(precision)).computes_half:
        return None
    return GPU_FLOAT32 if device == VULKAN and expects == "float32" else FLOORS.get(expects)


def arithmetic_tolerance(
    component: str, target: str, precision: str, expects: Computed, device: Device = CPU
) -> Tolerance:
    """`loss` against PyTorch in float32, under an arithmetic that computes as `expects` says."""
    scheme = tolerance("loss", component, target, precision)
    floor = floor_of(precision, expects, device)
    if floor is None:
        return scheme
    return Tolerance(round(together(scheme.min_snr_db, floor.of(component)), 1), f"{scheme.why}; {floor.why}")


def arithmetic_fidelity(
    component: str, target: str, precision: str, expects: Computed, device: Device = CPU
) -> Tolerance:
    """`fidelity`: against PyTorch with equally rounded weights."""
    scheme = tolerance("fidelity", component, target, precision)
    floor = floor_of(precision, expects, device)
    if floor is None:
        return scheme
    if scheme.min_snr_db > floor.of(component):  # at float32 only the order of sums differs: the arithmetic decides
        return Tolerance(floor.of(component), floor.why)
    return Tolerance(round(together(scheme.min_snr_db, floor.of(component)), 1), f"{scheme.why}; {floor.why}")


def arithmetic_image_tolerance(target: str, precision: str, expects: Computed, device: Device = CPU) -> ImageTolerance:
    """The picture's, in the same way."""
    scheme = image_tolerance(target, precision)
    floor = floor_of(precision, expects, device)
    if floor is None:
        return scheme
    return ImageTolerance(round(together(scheme.min_psnr_db, floor.picture_db), 1), f"{scheme.why}; {floor.why}")


def together(first_db: float, second_db: float) -> float:
    """The ratio in dB that two independent noises leave together: their powers add."""
    return -10 * math.log10(10 ** (-first_db / 10) + 10 ** (-second_db / 10))
