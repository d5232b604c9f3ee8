"""Pictures on disk: 8-bit PNG that says how it was drawn."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...stages.errors import NoRoom, UsageError
from .generate import Drawing


def to_uint8(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[H, W, 3] floats in 0..1 to bytes, rounded to nearest as diffusers' `numpy_to_pil` does."""
    return (image * 255).round().astype(np.uint8)


def refuse_unwritable_picture(path: Path) -> None:
    """Refuse before any work what `write_picture` would refuse after it.

    Raises:
        UsageError: `path` is not a .png, is a folder, or lies in a folder that cannot be written to.
        NoRoom: the disk is full.
    """
    try:
        is_folder = path.is_dir()
        if path.suffix.lower() != ".png" or is_folder:
            example = path / "picture.png" if is_folder else path.with_name(f"{path.stem}.png")
            raise UsageError(
                f"{path}: {'is a folder' if is_folder else 'pictures are written as .png'}", hint=f"try {example}"
            )
        scratch = _scratch(path)
        try:
            scratch.touch()
        finally:
            with suppress(OSError):
                scratch.unlink()
    except OSError as problem:
        raise _unwritable(path, problem) from problem


def write_picture(drawing: Drawing, path: Path) -> None:
    """Write a PNG that appears whole or not at all; the same drawing gives the same bytes.

    Its text chunks are prompt, negative_prompt, seed, steps, scheduler and guidance; and control_scale
    where the bundle has a ControlNet.

    Raises:
        UsageError, NoRoom: as `refuse_unwritable_picture`.
    """
    from PIL import Image, PngImagePlugin

    refuse_unwritable_picture(path)
    facts = PngImagePlugin.PngInfo()
    facts.add_text("Software", "diffusette")
    for key, value in (
        ("prompt", drawing.prompt),
        ("negative_prompt", drawing.negative),
        ("seed", drawing.seed),
        ("steps", drawing.steps),
        ("scheduler", drawing.scheduler),
        ("guidance", drawing.guidance),
        *([("control_scale", drawing.control_scale)] if drawing.control_scale is not None else []),
    ):
        facts.add_itxt(key, str(value))  # UTF-8, while plain text chunks hold Latin-1 only
    scratch = _scratch(path)
    try:
        Image.fromarray(to_uint8(drawing.image)).save(scratch, format="PNG", pnginfo=facts)
        scratch.replace(path)
    except OSError as problem:
        raise _unwritable(path, problem) from problem
    finally:
        with suppress(OSError):  # it is gone when all went well, and the error above matters more
            scratch.unlink()


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _unwritable(path: Path, problem: OSError) -> NoRoom | UsageError:
    what = f"{path}: cannot be written: {problem.strerror or problem}"
    if problem.errno == errno.ENOSPC:
        return NoRoom(what, hint="free some space, or choose another place with -o")
    return UsageError(what, hint="choose another place with -o")
