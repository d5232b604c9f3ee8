"""Starting from a picture: image-to-image, and inpainting where a mask says. numpy only.

What is computed is diffusers' StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline, noise included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...export.compiled_schedule import CompiledSchedule
from ...stages.errors import UsageError
from .picture_file import read_pixels

Floats = NDArray[np.float32]
Normal = Callable[[Sequence[int]], Floats]

USUAL_STRENGTH: Final = 0.8  # of diffusers' image-to-image pipelines; with a mask everything below it is drawn anew
INPAINTING_CHANNELS: Final = 9  # latents, mask, latents of what is kept
_LOG_VARIANCE: Final = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution


@dataclass(frozen=True, slots=True)
class Canvas:
    """A picture to start from."""

    image: Floats  # [1, 3, H, W], -1..1
    mask: Floats | None = None  # [1, 1, H, W]: 1 where it is drawn anew, 0 where it stays
    strength: float = 1.0  # 0..1: how much of the schedule is run

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UsageError(f"strength {self.strength:g} is not above 0 and at most 1", hint="0.8 is usual")

    @property
    def kept(self) -> Floats:
        """The picture with its masked part in mid grey."""
        return self.image if self.mask is None else self.image * (self.mask < 0.5)


def read_canvas(image: Path, mask: Path | None, strength: float | None, size: tuple[int, int]) -> Canvas:
    """Read a picture, and a mask whose white is drawn anew, and bring both to `size` (height, width).

    Raises:
        UsageError: a file is no picture, or too large; strength is out of range.
    """
    pixels = read_pixels(image, "RGB", size) * 2 - 1  # [H, W, 3]
    given = USUAL_STRENGTH if mask is None else 1.0
    return Canvas(
        image=np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]),
        mask=(read_pixels(mask, "L", size) >= 0.5).astype(np.float32)[None, None] if mask is not None else None,
        strength=given if strength is None else strength,
    )


def first_row(schedule: CompiledSchedule, strength: float) -> int:
    """Where a run of `strength` starts, as diffusers' `get_timesteps` counts.

    Raises:
        UsageError: no step would be left, or the solver cannot start in the middle.
    """
    run = min(int(schedule.steps * strength), schedule.steps)
    if run == 0:
        raise UsageError(
            f"strength {strength:g} leaves none of {schedule.steps} steps",
            hint=f"at least {1 / schedule.steps:g}, or more --steps",
        )
    row = schedule.steps - run
    if row and schedule.history > 1:
        raise UsageError(
            f"{schedule.scheduler} looks back at earlier steps and cannot start in the middle of its schedule",
            hint="use --scheduler ddim, euler or euler_a",
        )
    return row


def sampled(parameters: Floats, scaling_factor: float, shift: float, normal: Normal) -> Floats:
    """Latents [1, C, h, w] drawn from what the VAE encoder gives, [1, 2 C, h, w]: mean and log-variance."""
    mean, log_variance = np.split(parameters, 2, axis=1)
    deviation = np.exp(0.5 * np.clip(log_variance, *_LOG_VARIANCE), dtype=np.float32)
    latents: Floats = (mean + deviation * normal(mean.shape) - shift) * scaling_factor
    return latents.astype(np.float32, copy=False)


def mask_channels(mask: Floats, kept: Floats) -> Floats:
    """The channels beside the latents: the mask at the latents' size (nearest), and the latents of what is kept."""
    step = mask.shape[2] // kept.shape[2], mask.shape[3] // kept.shape[3]
    return np.concatenate([mask[:, :, :: step[0], :: step[1]], kept], axis=1)
