"""Textual inversion: embeddings of new words, appended to the text encoder's, and the words themselves.

"An Image is Worth One Word" (Gal et al. 2022). A word may stand for several vectors; then its tokens are WORD, WORD_1,
WORD_2, ..., as diffusers' loader names them, and a prompt's WORD becomes all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from ...stages.artifacts import Adapted, ComponentSource
from ...stages.errors import CheckpointError
from .file import AdapterFile

_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_EMBEDDING = re.compile(r"(^|\.)token_embedding\.weight$")


def add_words(
    adapter: AdapterFile,
    components: Mapping[str, ComponentSource],
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    scale: float,
    known: tuple[str, ...],
) -> tuple[dict[str, Adapted], tuple[str, ...]]:
    """The change of each text encoder's token embedding, and the new tokens in the order of their ids.

    Args:
        known: tokens that earlier adapters have added.
    Raises:
        CheckpointError: a width is not the encoder's, an encoder gets no vectors, a scale is given, or a word is taken.
    """
    where = f"--adapter {adapter.weights}"
    if scale != 1.0:
        raise CheckpointError(f"{where}: a textual inversion has no scale, {scale:g} was given", hint="leave it out")
    encoders = [name for name in components if name.startswith("text_encoder")]
    changes, counts = {}, set()
    for key, tensor in adapter.embeddings.items():
        component = _ENCODERS.get(key, "text_encoder")
        if component not in components:
            raise CheckpointError(f"{where}: {key!r} is for a second text encoder, which this checkpoint lacks")
        parameter = next(name for name in shapes[component] if _EMBEDDING.search(name))
        width = shapes[component][parameter][1]
        if tensor.shape[-1] != width or len(tensor.shape) > 2 or component in changes:
            raise CheckpointError(
                f"{where}: {key!r} has vectors of {tensor.shape[-1]}, {component}'s have {width}",
                hint="it was trained on another family of model",
            )
        rows = replace(tensor, shape=(tensor.shape[0] if len(tensor.shape) == 2 else 1, width))
        changes[component] = Adapted(parameter, "rows", ("rows",), (rows,), {}, scale)
        counts.add(rows.shape[0])
    if sorted(changes) != sorted(encoders) or len(counts) != 1:
        raise CheckpointError(
            f"{where}: vectors for {', '.join(sorted(changes))}, the checkpoint has {', '.join(sorted(encoders))}",
            hint="it was trained on another family of model",
        )
    word = next((key for key in adapter.embeddings if key.startswith("<")), adapter.weights.stem)
    tokens = tuple(word if number == 0 else f"{word}_{number}" for number in range(counts.pop()))
    taken = [token for token in tokens if token in known]
    if taken or any(character.isspace() for character in word):
        problem = "is added twice" if taken else "has a space in it"
        raise CheckpointError(f"{where}: the word {word!r} {problem}", hint="rename the file: its name is the word")
    return changes, tokens
