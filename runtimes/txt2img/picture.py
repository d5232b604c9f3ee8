"""Pictures on disk: 8-bit PNG that says how it was drawn."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import NoRoom, UsageError
from .generate import Drawing


def to_uint8(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[H, W, 3] floats in 0..1 to bytes, rounded to nearest as diffusers' `numpy_to_pil` does."""
    return (image * 255).round().astype(np.uint8)


def write_picture(drawing: Drawing, path: Path) -> None:
    """Write a PNG that appears whole or not at all; the same drawing gives the same bytes.

    Its text chunks are prompt, negative_prompt, seed, steps, scheduler and guidance.

    Raises:
        UsageError: `path` is not a .png in a folder that can be written to.
        NoRoom: the disk is full.
    """
    from PIL import Image, PngImagePlugin

    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: pictures are written as .png", hint=f"try {path.with_suffix('.png')}")
    facts = PngImagePlugin.PngInfo()
    facts.add_text("Software", "diffusette")
    for key, value in (
        ("prompt", drawing.prompt),
        ("negative_prompt", drawing.negative),
        ("seed", drawing.seed),
        ("steps", drawing.steps),
        ("scheduler", drawing.scheduler),
        ("guidance", drawing.guidance),
    ):
        facts.add_itxt(key, str(value))  # UTF-8, while plain text chunks hold Latin-1 only
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        Image.fromarray(to_uint8(drawing.image)).save(scratch, format="PNG", pnginfo=facts)
        scratch.replace(path)
    except OSError as problem:
        kind = NoRoom if problem.errno == errno.ENOSPC else UsageError
        raise kind(f"{path}: cannot be written: {problem.strerror or problem}") from problem
    finally:
        scratch.unlink(missing_ok=True)
