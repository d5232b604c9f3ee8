"""Prompts that probe a model: neutral ones for any checkpoint, captions of its own world for the embedded demo."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Final

from ...stages.errors import MissingTool
from .scenes import oracle_prompts

GENERAL: Final = (
    "a photograph of a red bicycle leaning against a brick wall",
    "a bowl of oranges on a wooden table, morning light",
    "a lighthouse on a cliff above the sea, oil painting",
    "a small dog running through tall grass",
    "snow-covered mountains under a clear night sky, long exposure",
    "an old stone bridge over a quiet river, watercolour",
)

_SHELF: Final = Path(__file__).parent / "calibration_prompts.txt"
_JUDGED: Final = 64  # captions that the oracle is asked of, those of the gates among them
_CALIBRATION_SEED: Final = 1  # of the demo's captions; gates and the oracle take those of seed 0

EMPTY: Final = ""  # what guidance is taken away from: every picture needs it

# Longer than the 77 tokens of CLIP's context under any vocabulary, so the cut is probed too.
_REPEATS: Final = 12


_GENERAL_SIZE: Final = 40_000
"""Tokens of a vocabulary that was made for any text; CLIP's has 49408."""

_SPELT_OUT: Final = (
    0.5  # share of whole words of `GENERAL` below which a tokenizer is foreign to it: the demo's has 0.33
)
_AT_HOME: Final = 0.95  # share of whole words of the captions above which they are its own: the demo's has all


def prompts_for(tokenizer: Path, count: int) -> tuple[str, ...]:
    """`count` prompts from the world of a checkpoint: neutral ones, or captions of the demo's, as its tokenizer speaks.

    What a model draws from words that are spelt out to it is noise that every rounding turns into another picture:
    with neutral prompts `w8c_afp` leaves the demo 32 dB in the worst of four pictures, with captions 50. So its
    single file, its fine-tunes and other models of its world are asked in words that they know.

    Args:
        tokenizer: folder of the checkpoint's first tokenizer.
    """
    if speaks_of_scenes(tokenizer):
        return tuple(scene.caption for scene in oracle_prompts(count, seed=0))
    return tuple(GENERAL[index % len(GENERAL)] for index in range(count))


def calibration_prompts(tokenizer: Path, count: int) -> tuple[str, ...]:
    """`count` prompts to calibrate with, none of which a gate uses: neutral ones, or captions of the demo's world."""
    if speaks_of_scenes(tokenizer):
        judged = {scene.caption for scene in oracle_prompts(_JUDGED, seed=0)}
        known = (scene.caption for scene in oracle_prompts(count + _JUDGED, seed=_CALIBRATION_SEED))
        return tuple(islice((caption for caption in known if caption not in judged), count))
    try:
        shelf = _SHELF.read_text("utf-8").splitlines()
    except OSError as error:
        raise MissingTool(
            f"the bundled calibration prompts cannot be read: {_SHELF}: {error.strerror}",
            hint="install diffusette again, or name prompts in a recipe's [calibrate]",
        ) from None
    return tuple(shelf[index % len(shelf)] for index in range(count))


def speaks_of_scenes(tokenizer: Path) -> bool:
    """Whether a tokenizer has the words of the demo's captions whole, and must spell out those of neutral prompts."""
    tokens = _tokens(tokenizer)
    if max((number for number in tokens.values() if isinstance(number, int)), default=-1) >= _GENERAL_SIZE:
        return False
    captions = (scene.caption for scene in oracle_prompts(12, seed=_CALIBRATION_SEED))
    return _whole(GENERAL, tokens) < _SPELT_OUT and _whole(captions, tokens) > _AT_HOME


def _whole(sentences: Iterable[str], tokens: Mapping[str, object]) -> float:
    """The share of words that are one token."""
    words = [word for sentence in sentences for word in re.findall(r"[a-z]+", sentence.lower())]
    return sum(f"{word}</w>" in tokens for word in words) / len(words)


def _tokens(folder: Path) -> Mapping[str, object]:
    """Token -> id, from vocab.json or tokenizer.json; none of a folder that has neither, or another form of either."""
    for name in ("vocab.json", "tokenizer.json"):
        try:
            found = json.loads((folder / name).read_text("utf-8"))
        except (OSError, ValueError):
            continue  # whoever needs the tokenizer says what is wrong with it
        if isinstance(found, dict) and name == "tokenizer.json":
            found = found.get("model", {}).get("vocab", {}) if isinstance(found.get("model", {}), dict) else {}
        if isinstance(found, dict):
            return found
    return {}


def too_long(prompt: str) -> str:
    """`prompt` over and over, until it must be cut."""
    return ", ".join([prompt] * _REPEATS)
