"""The graph of a wide network, learned from two narrow ones.

pnnx holds every weight twice, so a UNet of 3.4 GB takes 7.4 GB, although nothing in a graph depends on weights. But
a number in a graph that depends on the width of the network does so in a simple way: a count of channels grows with
the width, a count of weights with the width or its square, all else stays. So pnnx converts the same network
twice, at two small widths, and each number is carried on to the real width by the power of it that fits both.

Nothing is taken on trust: a number that fits no power, or a weight whose size is not that of the parameter of the
real network, ends the attempt, and pnnx gets the network at its full width.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from ..narrowing import NotAlikeError, carried
from .layout import LITERAL, PARAMETER, ZEROS, Blob
from .param import Layer
from .slots import slots_of

_NUMBER: Final = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_HEADS_KEY: Final = (
    1  # of MultiHeadAttention, https://github.com/Tencent/ncnn/blob/master/docs/developer-guide/operators.md
)


def widened(narrow: Sequence[Sequence[Layer]], widths: tuple[int, int], real: int) -> tuple[Layer, ...]:
    """The layers at width `real`, from those at two narrow `widths`.

    Raises:
        NotAlikeError: the two differ in more than numbers, or a number grows as no power of the width.
    """
    one, two = narrow
    if len(one) != len(two):
        raise NotAlikeError(f"{len(one)} layers at width {widths[0]}, {len(two)} at {widths[1]}")
    return tuple(_widened_layer(a, b, widths, real) for a, b in zip(one, two, strict=True))


def _widened_layer(one: Layer, two: Layer, widths: tuple[int, int], real: int) -> Layer:
    same = ("type", "inputs", "outputs")
    if any(getattr(one, field) != getattr(two, field) for field in same) or list(one.params) != list(two.params):
        raise NotAlikeError(f"layer {one.name} is {one} at width {widths[0]}, {two} at {widths[1]}")
    params = {key: _widened_value(value, two.params[key], widths, real) for key, value in one.params.items()}
    return dataclasses.replace(one, params=params)


def _widened_value(one: str, two: str, widths: tuple[int, int], real: int) -> str:
    """A parameter as written: a number, a list of them, or an expression with numbers in it."""
    if one == two:
        return one
    if _NUMBER.sub("#", one) != _NUMBER.sub("#", two):
        raise NotAlikeError(f"{one} at width {widths[0]} is {two} at {widths[1]}")
    pairs = zip(_NUMBER.findall(one), _NUMBER.findall(two), strict=True)
    wide = iter([_widened_number(a, b, widths, real) for a, b in pairs])
    return _NUMBER.sub(lambda _: next(wide), one)


def _widened_number(one: str, two: str, widths: tuple[int, int], real: int) -> str:
    if one == two:
        return one
    try:
        a, b = int(one), int(two)
    except ValueError:
        raise NotAlikeError(f"{one} at width {widths[0]} is {two} at {widths[1]}") from None
    return str(carried(a, b, widths, real))


def with_heads(layers: Sequence[Layer], blobs: Sequence[Blob], heads: Mapping[str, int]) -> tuple[Layer, ...]:
    """`layers` with the real count of heads in each attention.

    Args:
        blobs: the places of the weights; an attention is recognised by its query's.
        heads: path of each attention module -> its heads.
    Raises:
        NotAlikeError: an attention is not one layer of the graph, so its heads stand elsewhere too.
    """
    found = {}
    for blob in blobs:
        if blob.slot.type == "MultiHeadAttention" and blob.slot.role == "q_weight":
            module = blob.name.removesuffix(".to_q.weight")
            if module not in heads:
                raise NotAlikeError(f"layer {blob.slot.layer} is attention of {blob.name}, which is none")
            found[blob.slot.layer] = heads[module]
    if len(found) != len(heads):
        raise NotAlikeError(f"{len(found)} attention layers for {len(heads)} attention modules")
    return tuple(
        dataclasses.replace(layer, params={**layer.params, _HEADS_KEY: str(found[layer.name])})
        if layer.name in found
        else layer
        for layer in layers
    )


def widened_blobs(
    layers: Sequence[Layer], narrow: Sequence[Sequence[Blob]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Blob]:
    """The places of the weights in the wide graph `layers`, each as large as its parameter in `shapes`.

    Raises:
        NotAlikeError: the narrow graphs hold different parameters in a place, or the size of one is wrong.
    """
    slots = list(slots_of(layers))
    if not len(slots) == len(narrow[0]) == len(narrow[1]) or {b.name for b in narrow[0] if b.name} != set(shapes):
        raise NotAlikeError("the narrow graphs hold other weights than the wide network")
    for slot, one, two in zip(slots, *narrow, strict=True):
        if (one.kind, one.name, one.axes, one.offset) != (two.kind, two.name, two.axes, two.offset):
            raise NotAlikeError(f"{one} at one width is {two} at the other")
        shape = shapes[one.name] if one.kind == PARAMETER else ()
        fits = {
            PARAMETER: slot.elements == math.prod(shape),
            ZEROS: True,
            LITERAL: slot.elements == one.slot.elements == two.slot.elements,
        }
        if not fits[one.kind] or (slot.layer, slot.role) != (one.slot.layer, one.slot.role):
            raise NotAlikeError(f"{slot} cannot hold {one.name or one.kind} of shape {list(shape)}")
        yield dataclasses.replace(one, slot=slot, shape=shape)
