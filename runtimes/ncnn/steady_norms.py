"""GroupNorm over large groups, added up in two steps.

ncnn adds a group up in a few float32 chains. In a VAE at 1024 x 1024 a group has 2^22 values, and the rounding of these
sums leaves 86 dB of the decoder, where 512 x 512 leaves 104. Means of rows, and the mean of those, keep it; see
`runtimes/steady_norms.py` for the same on ONNX.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Final

from .layout import Blob, Written
from .masks import AS_FLOAT32, EXACT, KEY
from .param import Layer
from .slots import slots_of

# Values a group above which it pays: up to 2^20 (512 x 512), its tolerance allows for what ncnn does.
LONGEST_CHAIN: Final = 2**20

_SUB, _MUL, _ADD = "1", "2", "0"  # of BinaryOp
_SQUARE, _RSQRT = "4", "6"  # of UnaryOp
_MEAN: Final = "3"  # of Reduction
_AXES: Final = -23303  # of Reduction: an array, its length first
# Squares of activations can exceed float16, which GroupNorm itself never computes in: no phone may, here.
_IN_FLOAT32: Final = {KEY: str(EXACT)}


def with_steady_norms(
    layers: Iterable[Layer], blobs: Iterable[Blob], sizes: Mapping[str, tuple[int, int]]
) -> tuple[tuple[Layer, ...], tuple[Blob, ...]]:
    """`layers` and the contents of their `.bin`, each GroupNorm over more than `LONGEST_CHAIN` values taken apart.

    Args:
        sizes: height and width of the graph's inputs that are images or latents.
    """
    layers = tuple(layers)
    contents = iter(blobs)
    extents = _extents(layers, sizes)
    made = Written()
    for layer in layers:
        held = list(islice(contents, len(list(slots_of([layer])))))
        if layer.type == "GroupNorm" and _group(layer, extents) > LONGEST_CHAIN:
            _take_apart(made, layer, held)
        else:
            made.emit(layer, *held)
    return tuple(made.layers), tuple(made.blobs)


def _group(norm: Layer, extents: Mapping[str, tuple[int, int]]) -> int:
    """How many values a group has; 0 where the size is not known."""
    height, width = extents.get(norm.inputs[0], (0, 0))
    return height * width * norm.number(1) // max(norm.number(0), 1)


def _extents(layers: Iterable[Layer], sizes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Height and width of each feature map of a VAE: strides halve them, Interp doubles, all else leaves them."""
    found: dict[str, tuple[int, int]] = {}
    for layer in layers:
        known = [found[blob] for blob in layer.inputs if blob in found]
        if layer.type == "Input" and layer.name in sizes:
            known = [sizes[layer.name]]
        if not known or layer.type == "Reshape":  # attention's rows; what it adds to has its size still
            continue
        height, width = known[0]
        if layer.type == "Convolution" and (stride := layer.number(3, 1)) > 1:
            height, width = height // stride, width // stride
        if layer.type == "Interp":
            height, width = round(height * float(layer.params.get(1, 1))), round(width * float(layer.params.get(2, 1)))
        found.update(dict.fromkeys(layer.outputs, (height, width)))
    return found


def _take_apart(made: Written, norm: Layer, held: list[Blob]) -> None:
    """[C, H, W] -> groups as [G, C / G * H, W] -> (x - mean) / sqrt(variance + epsilon) -> [C, H, W] -> Scale."""

    def add(
        kind: str, what: str, inputs: tuple[str, ...], params: Mapping[int, str], outputs: int = 1
    ) -> tuple[str, ...]:
        name = f"{norm.name}.{what}"
        names = (name,) if outputs == 1 else tuple(f"{name}{letter}" for letter in "ab")
        made.emit(Layer(kind, name, tuple(inputs), names, params))
        return names

    def mean(what: str, of: str) -> str:
        over = {0: _MEAN, 1: "0", 4: "1", 5: "1", **_IN_FLOAT32}  # keeps its axes
        (rows,) = add("Reduction", f"{what}.rows", (of,), {**over, _AXES: "1,2"})
        (whole,) = add("Reduction", what, (rows,), {**over, _AXES: "1,1"})
        return whole

    groups, channels = norm.number(0), norm.number(1)
    grouped = add("Reshape", "groups", norm.inputs, {0: "0", 1: "-1", 2: str(groups)})
    first, second = add("Split", "both", add(AS_FLOAT32, "float32", grouped, {}), _IN_FLOAT32, outputs=2)
    centred = add("BinaryOp", "centred", (second, mean("mean", first)), {0: _SUB, **_IN_FLOAT32})
    first, second = add("Split", "twice", centred, _IN_FLOAT32, outputs=2)
    (squares,) = add("UnaryOp", "squares", (first,), {0: _SQUARE, **_IN_FLOAT32})
    epsilon = {0: _ADD, 1: "1", 2: norm.params.get(2, "1e-3"), **_IN_FLOAT32}
    variance = add("BinaryOp", "variance", (mean("squares.mean", squares),), epsilon)
    (factor,) = add("UnaryOp", "factor", variance, {0: _RSQRT, **_IN_FLOAT32})
    normal = add("BinaryOp", "normal", (second, factor), {0: _MUL, **_IN_FLOAT32})
    whole = {0: "0", 1: "-1", 2: str(channels)}
    if not norm.number(3, 1):
        made.emit(Layer("Reshape", norm.name, normal, norm.outputs, whole))
        return
    shaped = add("Reshape", "channels", normal, whole)
    made.emit(Layer("Scale", norm.name, shaped, norm.outputs, {0: str(channels), 1: "1"}), *held)
