"""Layers that multiply integers: weights of 8 bits an output channel, activations rounded to 8 bits.

ncnn has two such kernels. A Convolution (`8=2`) rounds its input over one range, which calibration has found. A Gemm
(`18=2`) rounds each row of its input over that row's own range as it comes, which loses less: a token that is an
outlier spoils no other. It has one scale for all of its weights, so here it multiplies bare codes, and layers after
it scale its columns. Vulkan's Gemm of integers ends
the process where a device lacks them, so both stay on the CPU.
Source: Tencent/ncnn, `src/layer/convolution.cpp` and `gemm.cpp`; docs/decisions/0035, 0101.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from .codes import BOOK_SCALES, CODES, INPUT_MULTIPLIER, MULTIPLIERS, UNIT
from .layout import Blob, Written
from .masks import KEY, NO_VULKAN
from .param import Layer

CONVOLUTION_TERM: Final = 8
"""The parameter of a Convolution that says its weights are integers; 2: activations too, by one range."""
GEMM_TERM: Final = 18
"""The same of a Gemm; 2: activations too, by a range a row."""

NOTE: Final = (
    "convolutions round their inputs to 8 bits over calibrated ranges, linear layers row by row as they come: leave "
    "ncnn's use_int8_inference on, as it is by default"
)

_ADD, _MUL = "0", "2"  # of BinaryOp


def multiplies_integers(layer: Layer) -> bool:
    """Whether `layer` is one of these."""
    term = {"Convolution": CONVOLUTION_TERM, "Gemm": GEMM_TERM}.get(layer.type)
    return term is not None and layer.number(term) != 0


def convolution(graph: Written, layer: Layer, weight: Blob, bias: Blob | None) -> None:
    """`layer` with the same inputs and outputs, on integers."""
    factors = replace(weight, kind=MULTIPLIERS), replace(weight, kind=INPUT_MULTIPLIER)
    rounding = replace(layer, params={**layer.params, CONVOLUTION_TERM: "2", KEY: str(NO_VULKAN)})
    graph.emit(rounding, replace(weight, kind=CODES), *([bias] if bias else []), *factors)


def linear(graph: Written, layer: Layer, weight: Blob, bias: Blob | None) -> None:
    """[M, K] x [O, K]^T + bias from `layer.inputs[0]` to `layer.outputs[0]`, on integers."""
    rows, columns = weight.shape
    params = {3: 1, 5: 1, 6: 1, 8: rows, 9: columns, 10: -1, GEMM_TERM: 2, KEY: NO_VULKAN}
    sums, scaled = f"{layer.name}.sums", f"{layer.name}.scaled" if bias else layer.outputs[0]
    gemm = Layer("Gemm", layer.name, layer.inputs, (sums,), {key: str(value) for key, value in params.items()})
    graph.emit(gemm, replace(weight, kind=CODES), replace(weight, kind=UNIT))

    def by_column(name: str, kind: str, operand: Blob, given: str, result: str) -> None:
        held = graph.add("MemoryData", (), operand, p0=rows, p1=1)
        graph.emit(Layer("BinaryOp", f"{layer.name}.{name}", (given, held), (result,), {0: kind}))

    by_column("scales", _MUL, replace(weight, kind=BOOK_SCALES), sums, scaled)
    if bias:
        by_column("bias", _ADD, bias, scaled, layer.outputs[0])


def any_integers(layers: Sequence[Layer]) -> bool:
    """Whether a graph multiplies integers."""
    return any(map(multiplies_integers, layers))
