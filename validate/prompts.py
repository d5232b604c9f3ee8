"""Prompts that probe a model: neutral ones for any checkpoint, captions of its own world for the embedded demo."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from .scenes import knows, oracle_prompts

GENERAL: Final = (
    "a photograph of a red bicycle leaning against a brick wall",
    "a bowl of oranges on a wooden table, morning light",
    "a lighthouse on a cliff above the sea, oil painting",
    "a small dog running through tall grass",
    "snow-covered mountains under a clear night sky, long exposure",
    "an old stone bridge over a quiet river, watercolour",
)

EMPTY: Final = ""  # what guidance is taken away from: every picture needs it

# Longer than the 77 tokens of CLIP's context under any vocabulary, so the cut is probed too.
_REPEATS: Final = 12


def prompts_for(digests: Iterable[str], count: int) -> tuple[str, ...]:
    """`count` prompts from the world of the checkpoint whose files have these sha256 digests."""
    if knows(digests):
        return tuple(scene.caption for scene in oracle_prompts(count, seed=0))
    return tuple(GENERAL[index % len(GENERAL)] for index in range(count))


def too_long(prompt: str) -> str:
    """`prompt` over and over, until it must be cut."""
    return ", ".join([prompt] * _REPEATS)
