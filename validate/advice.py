"""What to try about a module that adds much error, by what kind of operation it is."""

from __future__ import annotations

import re
from typing import Final

# The first pattern that is found in the module's own name, its parent's and its operation decides.
_ADVICE: Final[tuple[tuple[str, str], ...]] = (
    (
        r"norm",
        "A normalisation adds up squares. See whether its input is large (float16 ends at 65504); keep it in float32.",
    ),
    (
        r"\battn\d?\b|self_attn|\bto_[qkv]\b|\bto_out\b|\b[qkv]_proj\b|softmax",
        "A part of an attention: the softmax exponentiates errors of queries and keys, those of values and outputs "
        "pass on as they are. Give it more bits.",
    ),
    (
        r"time_emb|add_embedding|timestep",
        "The time embedding is read by every block, and is small. Keep it in float32.",
    ),
    (
        r"\bconv_in\b|\bconv_out\b|quant_conv",
        "A first or last convolution has few weights, and all of the picture passes through them. Keep it in float32.",
    ),
    (
        r"conv",
        "A convolution: compare its weights' scales by output channel; one large channel costs the others bits. Give "
        "it more bits.",
    ),
    (
        r"embed",
        "A table with a row for each token or position is read, not multiplied: more bits cost no time.",
    ),
    (
        r"linear|gemm|matmul|\bfc\d|proj|\bff\b",
        "A matrix product: take smaller groups, or more bits for its weights.",
    ),
)
_OTHER: Final = "It has no weights of its own kind here: compare another target, and look at what it is fed with."


def advice_for(module: str, op: str) -> str:
    """One or two sentences about `module`, a path of PyTorch's, which is an `op`."""
    own = ".".join(module.split(".")[-2:])
    return next((words for pattern, words in _ADVICE if re.search(pattern, f"{own} {op}".lower())), _OTHER)
