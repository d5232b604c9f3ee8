"""Pictures for a page: PyTorch's, the runtime's, and their difference made visible, as data URIs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Final

import numpy as np

from ..runtimes.protocol import Array
from .error_histogram import LEVELS

GAINS: Final = tuple(factor * 10**power for power in range(6) for factor in (1, 2, 5))
"""By which a difference may be multiplied, so that the caption names a number that a reader can hold."""

SMALL: Final = 256
"""Sides below this are shown with hard pixels: smoothing would hide what is looked for."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One prompt, drawn by both. Floats [H, W, 3] in 0..1, before rounding to 8 bits."""

    prompt: str
    seed: int
    reference: Array
    candidate: Array


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two pictures lie apart at each pixel, as a picture."""

    uri: str
    gain: float  # the difference was multiplied by this, 0 for equal pictures
    largest: float  # of the difference, in levels of an 8-bit picture


def difference_of(reference: Array, candidate: Array) -> Difference:
    """Black where both agree, then purple, orange and white; the largest channel counts at every pixel.

    The gain is the largest of `GAINS` at which at most one pixel of a hundred is brighter than white: one outlier
    must not darken all others.
    """
    apart = np.abs(reference.astype(np.float64) - candidate.astype(np.float64)).max(axis=2)
    largest = float(apart.max())
    usual = float(np.quantile(apart, 0.99)) or largest
    gain = max((gain for gain in GAINS if gain * usual <= 1), default=1) if largest else 0
    return Difference(png_uri(_heat(np.clip(apart * gain, 0, 1))), gain, largest * LEVELS)


def png_uri(image: Array) -> str:
    """`image`, [H, W, 3] floats in 0..1, as `data:image/png;base64,...`."""
    from PIL import Image

    content = io.BytesIO()
    pixels = np.rint(np.clip(image, 0, 1) * LEVELS).astype(np.uint8)
    Image.fromarray(pixels).save(content, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _heat(values: Array) -> Array:
    """[H, W] in 0..1 -> [H, W, 3]: matplotlib's inferno, whose lightness grows evenly (for all kinds of eyes)."""
    from matplotlib import colormaps

    return np.asarray(colormaps["inferno"](values))[..., :3]
