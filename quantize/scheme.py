"""The grammar of scheme names: a name says all about how weights and activations are stored."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ..pipeline.errors import UsageError

FLOATS: Final = ("fp32", "fp16")
_GRAMMAR: Final = re.compile(r"w(?P<weights>[2-8])(?P<groups>c|g\d+)_a(?P<activations>8|fp)")


@dataclass(frozen=True, slots=True)
class Scheme:
    """`fp16`, or `w<bits><granularity>_a<bits or fp>`: `w8c_afp` is int8 weights per output channel, float activations.

    Which of them a runtime executes is data in its folder; a well-formed name need not be one of these.
    """

    name: str
    weight_bits: int
    group: int | None  # weights that share a scale; None: an output channel, or floats, which have none
    activation_bits: int


def parse_scheme(name: str) -> Scheme:
    """Take a scheme's name apart.

    Raises:
        UsageError: it is not in the grammar.
    """
    if name in FLOATS:
        return Scheme(name, int(name[2:]), None, 32)
    match = _GRAMMAR.fullmatch(name)
    if not match:
        raise UsageError(
            f"{name!r} is not a scheme",
            hint=f"{', '.join(FLOATS)}, or w<bits><c or g<size>>_a<8 or fp> such as w8c_afp",
        )
    group = None if match["groups"] == "c" else int(match["groups"][1:])
    return Scheme(name, int(match["weights"]), group, 32 if match["activations"] == "fp" else 8)
