"""The grammar of scheme names: a name says all about how weights and activations are stored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from ..stages.errors import UsageError

HALF_COMPUTED: Final = "fp16_a16"
"""float16 weights, and float16 between operators: what is computed, not only stored."""

FLOATS: Final = ("fp32", "fp16", HALF_COMPUTED)
KEEP: Final = "keep"
"""In a rule: what it matches stays as the checkpoint has it, in float32 at most."""

SCALE_BITS: Final = 32  # scales are float32 on every runtime
BRANCH_BITS: Final = 16  # factors of a low-rank branch are float16
_GRAMMAR: Final = re.compile(
    r"w(?P<weights>[2-8])(?P<groups>c|g[1-9]\d*)(r(?P<rank>[1-9]\d{0,3}))?_a(?P<activations>8|fp)"
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """`fp32`, `fp16`, `fp16_a16`, or `w<bits><granularity>[r<rank>]_a<bits or fp>`.

    `fp16` is a way to store weights, `fp16_a16` also rounds activations to float16 between operators.
    `w8c_afp` is int8 weights with a scale an output channel, float activations; `w4g64_afp` int4 with a scale for
    every 64 weights of an output channel, in the order of memory. Integers are symmetric around zero.
    `w4g64r16_afp` has beside them a branch of rank 16 in float16, see `low_rank`: the codes are those of the rest.
    Which of them a runtime executes is data in its folder; a well-formed name need not be one of these.
    """

    name: str
    weight_bits: int
    group: int | None  # weights that share a scale; None: an output channel, or floats, which have none
    activation_bits: int
    rank: int = 0  # of the branch in float16; 0: none

    @property
    def without_branch(self) -> str:
        """The name of the same scheme without a low-rank branch."""
        return self.name.replace(f"r{self.rank}_", "_") if self.rank else self.name

    @property
    def at_8_bits(self) -> Scheme:
        """8 bits and a scale an output channel, its activations as they are: for rows that groups do not fit."""
        return parse_scheme(f"w8c_a{'8' if self.activation_bits == 8 else 'fp'}")

    @property
    def is_float(self) -> bool:
        return self.name in FLOATS

    @property
    def is_half(self) -> bool:
        """Whether weights are stored in float16."""
        return self.is_float and self.weight_bits == 16

    @property
    def computes_half(self) -> bool:
        """Whether the model itself asks for float16 between its operators."""
        return self.name == HALF_COMPUTED

    @property
    def top(self) -> int:
        """The largest code, 127 for 8 bits; the least is its negative."""
        return int(2 ** (self.weight_bits - 1)) - 1

    def groups(self, shape: Sequence[int]) -> int:
        """Scales an output channel of a weight of `shape` [O, ...]."""
        row = prod(shape[1:])
        return row // self.group_in(row)

    def group_in(self, row: int) -> int:
        """Weights that share a scale in an output channel of `row` weights.

        The largest divisor of the row that is not above the scheme's group: not every runtime can pad a last group.
        """
        if self.group is None:
            return row
        return next(size for size in range(min(self.group, row), 0, -1) if row % size == 0)

    def of_whole_channels(self, shape: Sequence[int], channels: int) -> Scheme:
        """This scheme for a runtime whose groups are input channels, each with its whole kernel.

        A group of a weight `shape` [O, I, ...] becomes a multiple of `channels` times the kernel's area, and twice
        `channels` at least: the largest that divides the row and is not above the scheme's group, or the smallest
        above it. Where none divides it, a row of at most two groups has one scale, and a longer one takes 8 bits.
        """
        row = prod(shape[1:])
        unit = channels * row // shape[1]
        fitting = [size for size in range(unit, row + 1, unit) if row % size == 0 and size >= 2 * channels]
        if self.group is None or self.group_in(row) in (row, *fitting):
            return self
        if not fitting and row > 2 * self.group:
            return self.at_8_bits
        group = max([size for size in fitting if size <= self.group], default=min(fitting, default=row))
        return parse_scheme(self.name.replace(f"g{self.group}", f"g{group}"))

    def bits(self, shape: Sequence[int]) -> int:
        """Bits that a tensor of `shape` takes, scales and branch included."""
        scales = 0 if self.is_float else shape[0] * self.groups(shape) * SCALE_BITS
        branch = self.rank * (shape[0] + prod(shape[1:])) * BRANCH_BITS if self.rank else 0
        return prod(shape) * self.weight_bits + scales + branch


def parse_scheme(name: str) -> Scheme:
    """Take a scheme's name apart; `keep` is float32.

    Raises:
        UsageError: it is not in the grammar.
    """
    if name == KEEP:
        name = "fp32"
    if name in FLOATS:
        bits, _, rounded = name[2:].partition("_a")
        return Scheme(name, int(bits), None, int(rounded or 32))
    match = _GRAMMAR.fullmatch(name)
    if not match:
        raise UsageError(
            f"{name!r} is not a scheme",
            hint=f"{', '.join(FLOATS)}, or w<bits><c or g<size>>_a<8 or fp> such as w8c_afp; "
            "with a low-rank branch w4g64r16_afp",
        )
    group = None if match["groups"] == "c" else int(match["groups"][1:])
    activations = 32 if match["activations"] == "fp" else 8
    return Scheme(name, int(match["weights"]), group, activations, int(match["rank"] or 0))
