"""A network built narrower, to learn the form of a converter's result without numbers of the real size.

A number in a graph that depends on the width of the network does so in a simple way: a count of channels grows with
the width, a count of weights with the width or its square, all else stays. docs/decisions/0011 and 0012.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Final

from ..stages.artifacts import role_of

WORTHWHILE: Final = 4  # the real width in units: below, the narrow networks together cost as much as the real one
_NARROW_HEADS: Final = 2  # one head could be folded away, and the graph would be another
_POWERS: Final = (1, 2)
_TEXT: Final = 1021  # width of the text that a narrow UNet takes: a prime, so that no layer of it is as wide

Width = int | Fraction


class NotAlikeError(Exception):
    """The narrow networks do not tell what the wide one looks like. Never leaves this folder."""


@dataclass(frozen=True, slots=True)
class Narrowing:
    """A network at two small widths; the real one has `real` units of the same width."""

    widths: tuple[int, int]
    real: int
    configs: tuple[dict[str, Any], dict[str, Any]]


def narrowing(component: str, config: Mapping[str, Any]) -> Narrowing | None:
    """How to build `component` narrower, or None when that is impossible or saves nothing."""
    if "block_out_channels" in config:
        return _narrow_blocks(component, config)
    if role_of(component) == "text":
        return _narrow_encoder(config)
    return None


@dataclass(frozen=True, slots=True)
class NarrowCopy:
    """A network of `width` units of width; the real one has `real` of them. Every number of it is a power of those."""

    config: dict[str, Any]
    width: int
    real: int
    whole: bool  # between the two it can only have a whole number of units: its heads are of one size
    aliases: Mapping[int, int]  # a number that is no other, and the real one that it stands for whatever the width


def narrow_copy(component: str, config: Mapping[str, Any]) -> NarrowCopy | None:
    """The narrowest network that `component` is a widening of, heads included; None if that saves nothing."""
    if role_of(component) == "text":
        plan = _narrow_encoder(config)
        return NarrowCopy(plan.configs[0], plan.widths[0], plan.real, True, {}) if plan else None
    if "block_out_channels" not in config or (units := _units(config)) is None:
        return None
    real = config["block_out_channels"][0] // units[0]
    heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 1
    text = config.get("cross_attention_dim")
    aliased = {"cross_attention_dim": _TEXT} if isinstance(text, int) else {}
    for width in range(1, real // WORTHWHILE + 1):
        channels = [unit * width for unit in units]
        if isinstance(heads, int):
            fitting = all(count % heads == 0 for count in channels)
            fixed: dict[str, Any] = {}
        else:
            narrow_heads = [Fraction(count * width, real) for count in heads]
            levels = zip(narrow_heads, config.get("down_block_types", ()), strict=False)
            fitting = all(count.denominator == 1 for count, block in levels if "Attn" in block)
            fixed = {"attention_head_dim": [max(1, int(count)) for count in narrow_heads], "num_attention_heads": None}
        if fitting:
            made = {**config, "block_out_channels": channels, **fixed, **aliased}
            return NarrowCopy(made, width, real, bool(fixed), {_TEXT: int(text)} if aliased and text else {})
    return None


def _units(config: Mapping[str, Any]) -> list[int] | None:
    """The channels of each level at the least width that the normalisation's groups allow."""
    channels, groups = config["block_out_channels"], config.get("norm_num_groups") or 32
    if any(count % groups for count in channels):
        return None
    real = math.gcd(*(count // groups for count in channels))
    return [count // real for count in channels]


def _narrow_blocks(component: str, config: Mapping[str, Any]) -> Narrowing | None:
    """UNet, ControlNet and VAE: channels in units of the normalisation's groups; heads are put right afterwards."""
    if (units := _units(config)) is None:
        return None
    real = config["block_out_channels"][0] // units[0]
    is_unet = role_of(component) in ("denoiser", "control")
    heads = {"attention_head_dim": _NARROW_HEADS, "num_attention_heads": None} if is_unet else {}
    return _narrowing((1, 2), real, config, {"block_out_channels": units}, heads)


def _narrow_encoder(config: Mapping[str, Any]) -> Narrowing | None:
    """CLIP's text model: fewer heads of the same width, since both stand in its graph."""
    heads = config["num_attention_heads"]
    parts = {key: config[key] // heads for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    if any(config[key] != part * heads for key, part in parts.items()):
        return None
    return _narrowing((2, 3), heads, config, parts, {})


def _narrowing(
    widths: tuple[int, int], real: int, config: Mapping[str, Any], units: Mapping[str, Any], fixed: Mapping[str, Any]
) -> Narrowing | None:
    if real < WORTHWHILE * widths[0]:
        return None

    def at(width: int) -> dict[str, Any]:
        scaled = {k: [width * n for n in unit] if isinstance(unit, list) else width * unit for k, unit in units.items()}
        return {**config, **scaled, **fixed}

    return Narrowing(widths, real, (at(widths[0]), at(widths[1])))


def carried(
    one: int, two: int, widths: tuple[Width, Width], wanted: Width, aliases: Mapping[int, int] = MappingProxyType({})
) -> int:
    """The number at width `wanted` that is `one` and `two` at `widths`: as the power of the width that fits both.

    Raises:
        NotAlikeError: none does, or it would be no whole number.
    """
    if one == two:
        return aliases.get(one, one)
    for power in _POWERS:
        value = one * Fraction(wanted, widths[0]) ** power
        if one * Fraction(widths[1], widths[0]) ** power == two and value.denominator == 1:
            return int(value)
    raise NotAlikeError(f"{one} at width {widths[0]} is {two} at {widths[1]}: no power of the width fits {wanted}")
