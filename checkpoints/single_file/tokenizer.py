"""A tokenizer for a single file, which carries none: given, beside it, or CLIP's own, which is shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from ...stages.errors import CheckpointError
from ..diffusers_folder import find_tokenizer_files, read_json

CLIP: Final = Path(__file__).resolve().parent / "clip"
OPEN_CLIP: Final = CLIP.with_name("open_clip")
CLIP_VOCABULARY: Final = 49408  # tokens of "Learning Transferable Visual Models" (Radford et al. 2021)


def find_tokenizer(file: Path, given: Path | None, vocabulary: int, *, part: str, open_clip: bool) -> tuple[Path, str]:
    """The tokenizer's folder, and who says so.

    Args:
        given: `--tokenizer`: a tokenizer's folder, or a checkpoint's that holds `tokenizer/`.
        vocabulary: rows of the token embedding.
        part: "tokenizer", or "tokenizer_2" of the second text encoder.
        open_clip: OpenCLIP fills prompts with token 0 where OpenAI's CLIP repeats the end token.
    Raises:
        CheckpointError: there is none for a vocabulary of this size, or the given one has more tokens.
    """
    if given is not None:
        inner = given / part
        folder = inner if inner.is_dir() else given
        _refuse_misfit(folder, vocabulary)
        return folder, "--tokenizer"
    beside = file.parent / part
    if beside.is_dir() and size_of(beside) == vocabulary:
        return beside, f"the folder {part}/ beside the file"
    if vocabulary == CLIP_VOCABULARY:
        return (OPEN_CLIP, "CLIP's vocabulary, filled as OpenCLIP's") if open_clip else (CLIP, "CLIP's vocabulary")
    raise CheckpointError(
        f"{file}: its text encoder knows {vocabulary} tokens, CLIP's has {CLIP_VOCABULARY}, "
        "and a single file carries no tokenizer",
        hint="give it: --tokenizer FOLDER (with tokenizer.json, or vocab.json and merges.txt)",
    )


def size_of(folder: Path) -> int:
    """Number of tokens of a tokenizer's folder: its highest id, plus one."""
    find_tokenizer_files(folder)
    ids: list[int] = []
    if (folder / "tokenizer.json").is_file():
        content = read_json(folder / "tokenizer.json")
        ids += content.get("model", {}).get("vocab", {}).values()
        ids += [token["id"] for token in content.get("added_tokens", ())]
    else:
        ids += read_json(folder / "vocab.json").values()
        if (folder / "added_tokens.json").is_file():
            ids += json.loads((folder / "added_tokens.json").read_text(encoding="utf-8")).values()
    return max(ids, default=-1) + 1


def _refuse_misfit(folder: Path, vocabulary: int) -> None:
    tokens = size_of(folder)
    if tokens > vocabulary:
        raise CheckpointError(
            f"{folder}: {tokens} tokens, the text encoder knows {vocabulary}",
            hint="take the tokenizer that the checkpoint was trained with",
        )
