"""A checkpoint's tokenizer -> one tokenizer.json that the `tokenizers` library reads without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from ..stages.errors import CheckpointError

# transformers writes 1e30 where a tokenizer_config.json states no length; no text encoder takes as many as this.
UNSTATED: Final = 2**16


def write_tokenizer(source: Path, into: Path, added: tuple[str, ...] = ()) -> dict[str, Any]:
    """Write `into`/tokenizer.json. The same source gives the same bytes.

    It is written from what transformers' CLIPTokenizer makes of the folder, whether that holds a tokenizer.json or
    vocab.json and merges.txt: the class has its own normalizer, and is the reference.

    Args:
        source: the checkpoint's tokenizer folder.
        into: an existing folder.
        added: words of textual inversions, which get the ids behind all others.
    Returns:
        kind, files (below `into`), max_tokens, pad_id, bos_id, eos_id.
    Raises:
        CheckpointError: the folder holds no CLIP tokenizer, or one without a length or special tokens.
    """
    from transformers import CLIPTokenizer

    if not (source / "tokenizer.json").is_file():
        missing = [name for name in ("vocab.json", "merges.txt") if not (source / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{source}: no tokenizer.json, and no {' and no '.join(missing)}",
                hint="copy the tokenizer folder of the checkpoint's family beside the weights",
            )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source, local_files_only=True)
        stated = int(tokenizer.model_max_length)
    except Exception as problem:
        raise CheckpointError(f"{source}: transformers cannot read this tokenizer: {problem}") from problem
    _add(tokenizer, added, source)
    facts = {
        "kind": "clip",
        "files": ["tokenizer.json"],
        "max_tokens": stated,
        "pad_id": tokenizer.pad_token_id,
        "bos_id": tokenizer.bos_token_id,
        "eos_id": tokenizer.eos_token_id,
    }
    if facts["max_tokens"] > UNSTATED:
        raise CheckpointError(
            f"{source}: tokenizer_config.json states no model_max_length", hint="CLIP's is 77; write it there"
        )
    absent = [name for name in ("pad_id", "bos_id", "eos_id") if facts[name] is None]
    if absent:
        raise CheckpointError(f"{source}: the tokenizer has no {', '.join(absent)}")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # length and padding are the generator's business, and may have been left there by an earlier call
    content |= {"truncation": None, "padding": None}
    text = json.dumps(content, ensure_ascii=False, indent=1)
    (into / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    return facts


def _add(tokenizer: Any, added: tuple[str, ...], source: Path) -> None:
    """Append words, each with the id that its row of the embedding has.

    Raises:
        CheckpointError: a word is in the vocabulary already.
    """
    before = len(tokenizer)
    taken = [word for word in added if word in tokenizer.get_vocab()]
    if taken:
        raise CheckpointError(
            f"{source}: the word {taken[0]!r} of a textual inversion is a token already",
            hint="rename the adapter's file: its name is the word",
        )
    tokenizer.add_tokens(list(added))
    if tokenizer.convert_tokens_to_ids(list(added)) != list(range(before, before + len(added))):
        raise CheckpointError(f"{source}: this tokenizer does not take new words behind its {before} tokens")
