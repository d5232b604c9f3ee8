"""Pictures that a user gives, as arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...stages.errors import UsageError

Floats = NDArray[np.float32]

_MAX_PIXELS: Final = 2**28  # of a picture that is read; a hostile file can claim any size


def read_pixels(file: Path, mode: str, size: tuple[int, int]) -> Floats:
    """[H, W] or [H, W, 3] in 0..1, resized with Lanczos' filter as diffusers' VaeImageProcessor does."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            if opened.width * opened.height > _MAX_PIXELS:
                raise UsageError(f"{file}: {opened.width} x {opened.height} pixels", hint="scale it down first")
            picture = opened.convert(mode)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as problem:
        raise UsageError(f"{file}: cannot be read as a picture: {problem}", hint="give a PNG or JPEG file") from None
    if picture.size != (size[1], size[0]):
        picture = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.float32) / np.float32(255)
