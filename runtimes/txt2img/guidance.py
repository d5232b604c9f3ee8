"""How strongly a prompt steers: classifier-free guidance, or a guidance scale that the UNet was trained to read."""

from __future__ import annotations

import math
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from ...stages.errors import UsageError

# cfg: two UNet runs a step; embedded: one run with `timestep_cond` (LCM); none: one run, no guidance (turbo)
Mode = Literal["cfg", "embedded", "none"]

SCALE: Final = 1000.0  # guidance scales are embedded like timesteps, of which there are 1000
MAX_PERIOD: Final = 10000.0


def unconditional_needed(mode: Mode, guidance: float) -> bool:
    """Whether each step needs a second run with the negative prompt, as diffusers decides it."""
    return mode == "cfg" and guidance > 1


def check_guidance(mode: Mode, guidance: float) -> float:
    """`guidance`, if a model of this mode can follow it.

    Raises:
        UsageError: it is not a finite number, or the model takes none.
    """
    if not math.isfinite(guidance):
        raise UsageError(f"guidance {guidance} is not a finite number", hint="7.5 is usual; 1 switches it off")
    if mode == "none" and guidance > 1:
        raise UsageError(f"this model was distilled to work without guidance, {guidance} was asked for", hint="use 1")
    return guidance


def combine(
    unconditional: NDArray[np.float32], conditional: NDArray[np.float32], guidance: float
) -> NDArray[np.float32]:
    """Classifier-free guidance (Ho & Salimans 2022) as Imagen weighs it: 1 is no guidance."""
    return unconditional + guidance * (conditional - unconditional)


def guidance_embedding(guidance: float, dim: int) -> NDArray[np.float32]:
    """The sinusoid of a guidance scale that latent consistency models read (Luo et al. 2023), [1, dim].

    diffusers `get_guidance_scale_embedding` of guidance - 1: sines, then cosines, then a zero if `dim` is odd.
    """
    half = dim // 2
    frequency = np.exp(-math.log(MAX_PERIOD) / (half - 1) * np.arange(half, dtype=np.float32), dtype=np.float32)
    angle = np.float32((guidance - 1) * SCALE) * frequency
    embedding = np.zeros((1, dim), np.float32)
    embedding[0, :half] = np.sin(angle)
    embedding[0, half : 2 * half] = np.cos(angle)
    return embedding
