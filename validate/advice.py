"""What to try about a module that adds much error, by what kind of operation it is."""

from __future__ import annotations

import re
from typing import Final

# The first pattern that is found in "module op" decides. Words are for whoever owns the recipe, not the runtime.
_ADVICE: Final[tuple[tuple[str, str], ...]] = (
    (
        r"norm",
        "Normalisation: sums many squares. See whether its input is large (fp16 overflows at 65504), and keep it in "
        "float32.",
    ),
    (
        r"softmax|attn|attention",
        "Attention: errors in scores are exponentiated. Give its q, k and v projections more bits.",
    ),
    (
        r"time_emb|timestep",
        "Time embedding: every block reads it and it is small. Keep it at fp32.",
    ),
    (
        r"conv_in|conv_out|quant_conv",
        "First or last convolution: few weights, and all of the picture passes through them. Keep it at fp32.",
    ),
    (
        r"conv",
        "Convolution: compare its weights' scales by output channel; a single large channel costs the others bits. "
        "Give it more bits.",
    ),
    (
        r"embed",
        "Embedding table: a row a token. Give it more bits, it is read and not multiplied.",
    ),
    (
        r"linear|gemm|matmul|fc\d|proj|ff\.",
        "Matrix product: smaller groups or more bits for its weights.",
    ),
)
_OTHER: Final = "Feed it alone (`validate --layers` did) and compare its weights with the checkpoint's."


def advice_for(module: str, op: str) -> str:
    """One or two sentences."""
    text = f"{module} {op}".lower()
    return next((words for pattern, words in _ADVICE if re.search(pattern, text)), _OTHER)
