"""Prompts that probe a model: neutral ones for any checkpoint, captions of its own world for the embedded demo."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ..pipeline.errors import MissingTool
from .scenes import knows, oracle_prompts

GENERAL: Final = (
    "a photograph of a red bicycle leaning against a brick wall",
    "a bowl of oranges on a wooden table, morning light",
    "a lighthouse on a cliff above the sea, oil painting",
    "a small dog running through tall grass",
    "snow-covered mountains under a clear night sky, long exposure",
    "an old stone bridge over a quiet river, watercolour",
)

_SHELF: Final = Path(__file__).parent / "calibration_prompts.txt"
_CALIBRATION_SEED: Final = 1  # of the demo's captions; gates and the oracle take those of seed 0

EMPTY: Final = ""  # what guidance is taken away from: every picture needs it

# Longer than the 77 tokens of CLIP's context under any vocabulary, so the cut is probed too.
_REPEATS: Final = 12


def prompts_for(digests: Iterable[str], count: int) -> tuple[str, ...]:
    """`count` prompts from the world of the checkpoint whose files have these sha256 digests."""
    if knows(digests):
        return tuple(scene.caption for scene in oracle_prompts(count, seed=0))
    return tuple(GENERAL[index % len(GENERAL)] for index in range(count))


def calibration_prompts(digests: Iterable[str], count: int) -> tuple[str, ...]:
    """`count` prompts to calibrate with, none of which a gate uses: neutral ones, or captions of the demo's world."""
    if knows(digests):
        return tuple(scene.caption for scene in oracle_prompts(count, seed=_CALIBRATION_SEED))
    try:
        shelf = _SHELF.read_text("utf-8").splitlines()
    except OSError as error:
        raise MissingTool(
            f"the bundled calibration prompts cannot be read: {_SHELF}: {error.strerror}",
            hint="install diffusette again, or name prompts in a recipe's [calibrate]",
        ) from None
    return tuple(shelf[index % len(shelf)] for index in range(count))


def too_long(prompt: str) -> str:
    """`prompt` over and over, until it must be cut."""
    return ", ".join([prompt] * _REPEATS)
