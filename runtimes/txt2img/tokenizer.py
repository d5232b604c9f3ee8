"""Prompts to token ids, exactly as CLIPTokenizer makes them, from tokenizer.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ...stages.errors import BundleError, UsageError
from ...stages.plain_file import read_plain

if TYPE_CHECKING:
    from tokenizers import Encoding

END_OF_WORD: Final = "</w>"  # CLIP's byte-pair encoding marks where a word ends, and decoding shows it


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """`ids` is [1, max_tokens] int64: start, text, end, padding. `removed` is the text that did not fit."""

    ids: NDArray[np.int64]
    removed: str = ""

    @property
    def warning(self) -> str:
        """diffusers' words for a prompt that was cut, or an empty string."""
        if not self.removed:
            return ""
        return (
            "The following part of your input was truncated because CLIP can only handle sequences up to"
            f" {self.ids.shape[1]} tokens: {[self.removed]}"
        )


class PromptTokenizer:
    """A tokenizer.json, with the length that the text encoder takes.

    Args:
        folder: holds tokenizer.json.
        max_tokens: tokens that the text encoder takes, start and end included (CLIP: 77).
        pad_id: what fills the rest: the end token in SD 1.x, 0 in SD 2.x.
    Raises:
        BundleError: there is no readable tokenizer, or it knows no token `pad_id`.
    """

    def __init__(self, folder: Path, max_tokens: int, pad_id: int) -> None:
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        try:
            text = read_plain(file).decode("utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise BundleError(f"{file}: cannot be read: {problem}", hint="convert the checkpoint again") from None
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as problem:  # noqa: BLE001 - the package raises bare Exception for what it cannot parse
            raise BundleError(f"{file}: is no tokenizer: {problem}", hint="convert the checkpoint again") from None
        if tokenizer.id_to_token(pad_id) is None:
            raise BundleError(f"{file}: pad_id {pad_id} is none of its {tokenizer.get_vocab_size()} tokens")
        # the file may carry settings of its own; length and padding are decided here
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.pad_id = pad_id

    def __call__(self, prompt: str) -> TokenizedPrompt:
        """Tokenize one prompt; whatever exceeds `max_tokens` is cut off its end and reported.

        Raises:
            UsageError: the prompt is not text, as when a terminal passes bytes that are not UTF-8.
        """
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as problem:
            raise UsageError(
                f"the prompt has a character that is no Unicode text at position {problem.start}: {prompt!r:.80}",
                hint="pass the prompt as UTF-8",
            ) from None
        whole: Encoding = self._tokenizer.encode(self._with_all_vectors(prompt))
        ids, surplus = list(whole.ids), len(whole.ids) - self.max_tokens
        if surplus <= 0:
            return TokenizedPrompt(_row(ids + [self.pad_id] * -surplus))
        # what is cut is the text before the end token, which stays
        removed = ids[self.max_tokens - 1 : -1]
        return TokenizedPrompt(_row([*ids[: self.max_tokens - 1], ids[-1]]), self._decode(removed))

    def _with_all_vectors(self, prompt: str) -> str:
        """Each word of a textual inversion with its further tokens, WORD WORD_1 ..., as diffusers spells it."""
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if not token.special}
        for word in sorted(added, key=len, reverse=True):
            if f"{word}_1" in added and word in self._tokenizer.encode(prompt).tokens:
                further = [f"{word}_{number}" for number in range(1, len(added)) if f"{word}_{number}" in added]
                prompt = prompt.replace(word, " ".join([word, *further]))
        return prompt

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text.replace(END_OF_WORD, " ").strip()


def _row(ids: list[int]) -> NDArray[np.int64]:
    return np.array([ids], np.int64)
