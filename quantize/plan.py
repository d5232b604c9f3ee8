"""Which scheme each parameter of a component is stored at: a default, and exceptions by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from .layer_ranges import LayerRanges
from .samples import Samples
from .scheme import Scheme, parse_scheme

Shapes = Mapping[str, Sequence[int]]
"""Parameter name -> shape, as PyTorch has it."""

# Added to activations once, not multiplied: 0.05 % of a text encoder, and no runtime keeps it in codes.
_NEVER_CODED: Final = re.compile(r"(^|\.)position_embedding\.weight$")
EMBEDDING: Final = re.compile(r"(^|\.)(token|position)_embedding\.weight$")
"""Whose rows are looked up: neither sums over inputs nor a low-rank branch make sense of them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A default scheme, and exceptions: (parameter or the module that owns it, scheme), the parameter's own first.

    At `fp16` and `fp16_a16`, every parameter of two or more dimensions is rounded. At an integer scheme, the weights of
    convolutions, linear layers and token embeddings are: those of two or more dimensions but position embeddings.
    Biases and norms stay float32 at any scheme.
    """

    default: str
    exceptions: tuple[tuple[str, str], ...] = ()
    samples: Samples | None = None  # codes are rounded for the least output error along these; None: to the nearest
    tuned: Samples | None = None  # scales are then fitted for the least error of the whole component along these
    ranges: LayerRanges | None = None  # by which activations of 8 bits are rounded; None: by their own, as they come
    # further schemes that a search has had rounded in the same passes: they change no value, only what is at hand
    rounded_with: tuple[str, ...] = ()
    # a group of weights holds a multiple of so many input channels, whole; 0: groups are in the order of memory
    channels: int = 0

    @property
    def label(self) -> str:
        """The default, then the schemes of exceptions: `w8c_afp+fp16`. What people and tolerances know it by."""
        return "+".join(dict.fromkeys([self.default, *sorted({scheme for _, scheme in self.exceptions})]))

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme that was asked for, the default first."""
        return tuple(parse_scheme(name) for name in self.label.split("+"))

    @property
    def is_float(self) -> bool:
        """Whether no parameter is stored as integer codes."""
        return all(scheme.is_float for scheme in self.schemes)

    def scheme(self, parameter: str, shape: Sequence[int]) -> Scheme:
        """How `parameter` of `shape` is really stored.

        A weight whose rows have no divisor between half the group and the group (the 4 weights of a pointwise
        convolution of latents) would get scales for a handful of numbers; it takes 8 bits an output channel instead.
        What cannot have the branch of a scheme (`has_branch`) is stored at the scheme without it.
        """
        exceptions = dict(self.exceptions)
        asked = parse_scheme(exceptions.get(parameter) or exceptions.get(parameter.rpartition(".")[0]) or self.default)
        if len(shape) < 2:
            return _FP32
        if asked.is_float:
            return asked
        if not can_be_coded(parameter, shape):
            return _FP32
        if asked.group is not None and 2 * asked.group_in(prod(shape[1:])) < asked.group:
            return asked.at_8_bits
        if self.channels and not EMBEDDING.search(parameter):
            asked = asked.of_whole_channels(shape, self.channels)
        if asked.rank and not has_branch(parameter, shape, asked.rank):
            return parse_scheme(asked.without_branch)
        return asked

    def bits(self, shapes: Shapes) -> int:
        """Bits that parameters of `shapes` take, scales, biases and norms included."""
        return sum(self.scheme(name, shape).bits(shape) for name, shape in shapes.items())

    def bits_per_weight(self, shapes: Shapes) -> float:
        """`bits` for each parameter."""
        return self.bits(shapes) / sum(prod(shape) for shape in shapes.values())

    def key(self) -> dict[str, Any]:
        """The plan for the key of a stage."""
        key: dict[str, Any] = {"default": self.default, "exceptions": sorted([list(pair) for pair in self.exceptions])}
        if self.channels:
            key["channels"] = self.channels
        if self.samples is None or self.is_float:
            return key
        return {**key, "samples": self.samples.digest, **({"tuned": self.tuned.digest} if self.tuned else {})}


_FP32: Final = parse_scheme("fp32")


def can_be_coded(parameter: str, shape: Sequence[int]) -> bool:
    """Whether integer schemes apply to a parameter."""
    return len(shape) >= 2 and not _NEVER_CODED.search(parameter)


def has_branch(parameter: str, shape: Sequence[int], rank: int) -> bool:
    """Whether a layer can have a low-rank branch of `rank`: it is no embedding, and the rank is below its own."""
    return not EMBEDDING.search(parameter) and rank < min(shape[0], prod(shape[1:]))


def plan_of(schemes: Mapping[str, str], shapes: Shapes) -> Plan:
    """The plan that gives each parameter its scheme; the scheme of most numbers is the default.

    Args:
        schemes: parameter -> scheme, for every one of `shapes` that has two or more dimensions.
    """
    counts: dict[str, int] = {}
    for name, scheme in schemes.items():
        counts[scheme] = counts.get(scheme, 0) + prod(shapes[name])
    default = max(counts, key=lambda scheme: counts[scheme])
    return Plan(default, tuple(sorted((name, scheme) for name, scheme in schemes.items() if scheme != default)))


def shares(plan: Plan, shapes: Shapes) -> dict[str, tuple[float, float]]:
    """Scheme that is really used -> (its share of the parameters, its bits a weight with scales)."""
    numbers: dict[str, int] = {}
    bits: dict[str, int] = {}
    for name, shape in shapes.items():
        scheme = plan.scheme(name, shape)
        numbers[scheme.name] = numbers.get(scheme.name, 0) + prod(shape)
        bits[scheme.name] = bits.get(scheme.name, 0) + scheme.bits(shape)
    total = sum(numbers.values())
    return {name: (numbers[name] / total, bits[name] / numbers[name]) for name in sorted(numbers)}
