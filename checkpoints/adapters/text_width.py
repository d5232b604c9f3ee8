"""The width of the text that an adapter was trained with: tells families apart before anything heavy is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ...stages.errors import CheckpointError
from ..families import TEXT_WIDTHS
from .file import read_adapter

_READS_TEXT: Final = re.compile(r"attn2[._]to_[kv]$")  # keys and values of the attention to the text, in any key style
_TAKES: Final = ("down", "hada_w1_b")  # factors whose second axis is what the weight takes


def refuse_other_width(given: tuple[tuple[Path, float], ...], width: object) -> None:
    """Compare the UNet's part of each adapter with the UNet, from headers.

    Args:
        given: files or folders, with scales.
        width: channels of the text that the checkpoint's UNet reads, `cross_attention_dim` of its configuration.
    Raises:
        CheckpointError: one was trained on a UNet that reads text of another width; names both families.
    """
    for place, _ in given:
        widths = {
            stored.factors[role].shape[1]
            for stored in read_adapter(place).modules
            if _READS_TEXT.search(stored.name)
            for role in _TAKES
            if role in stored.factors and len(stored.factors[role].shape) > 1
        }
        if len(widths) == 1 and widths != {width}:
            raise CheckpointError(
                f"--adapter {place}: made for a UNet that reads text of {_named(*widths)} channels, "
                f"this checkpoint's reads {_named(width)}",
                hint="it was trained on another family of model",
            )


def _named(width: object) -> str:
    title = TEXT_WIDTHS.get(width) if isinstance(width, int) else None
    return f"{width} ({title})" if title else f"{width}"
