"""Which layers add up products in float32, and how convolutions are computed, in an app that sets no option.

On a processor with float16 arithmetic ncnn adds products up in float16, and a convolution may be turned into Winograd's
form or into one matrix product. What that costs depends on the layer (docs/decisions/0101):

- Winograd's transforms cancel large sums: 10 dB of a UNet in float16. They also hold four times the weights of a 3x3
  kernel, 10.7 GB for 5.0 in Stable Diffusion 1.5's UNet. No convolution uses it.
- As one matrix product, a convolution unfolds its input ninefold: 6.4 GB for 1.7 in a VAE decoder at 512 x 512. A VAE's
  do not. Their direct form adds 9 C products in one chain, which float16 does not bear: they add up in float32.
- A UNet's answer at the last steps is the little noise that is left in a nearly clean picture. Its values are 30 times
  smaller than the sample's, whose float16 rounding alone is at 45 dB of it. The convolution that reads the sample takes
  and makes float32. What noise a picture has in its finest detail passes through the layers at full size, before the
  first halving and after the last doubling: those add up in float32. Deeper ones see averages.
- A control net's answers go to every level, so all of its layers add up in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

from ...stages.artifacts import role_of
from .masks import EXACT, KEY, NO_FP16_ARITHMETIC, NO_SGEMM, NO_WINOGRAD
from .param import Layer

_SUMMING: Final = ("Convolution", "Gemm", "InnerProduct", "MultiHeadAttention", "SDPA")
_NOISY: Final = ("sample",)  # the input of a UNet or control net that is a picture and noise
_STRIDE: Final = 3  # of Convolution


def with_float32_sums(layers: Sequence[Layer], component: str) -> tuple[Layer, ...]:
    """`layers` with the options that each is kept from; in float32 they compute what they did."""
    full_size = _at_full_size(layers) if role_of(component) == "denoiser" else range(len(layers))
    made = []
    for index, layer in enumerate(layers):
        bits = _bits(layer, component, index in full_size)
        mask = {KEY: str(layer.number(KEY) | bits)} if bits else {}
        made.append(replace(layer, params={**layer.params, **mask}))
    return tuple(made)


def _bits(layer: Layer, component: str, at_full_size: bool) -> int:
    if layer.type not in _SUMMING:
        return 0
    is_convolution = layer.type == "Convolution"
    bits = NO_WINOGRAD if is_convolution else 0
    match role_of(component):
        case "decoder" | "encoder" if is_convolution:
            return bits | NO_SGEMM | NO_FP16_ARITHMETIC
        case "denoiser" | "control":
            bits |= NO_FP16_ARITHMETIC if at_full_size else 0
            return bits | (EXACT if is_convolution and layer.inputs[0] in _NOISY else 0)
    return bits


def _at_full_size(layers: Sequence[Layer]) -> Collection[int]:
    """Where the layers of a UNet stand that come before its first halving, or after its last doubling."""
    halving = [i for i, layer in enumerate(layers) if layer.type == "Convolution" and layer.number(_STRIDE, 1) > 1]
    doubling = [i for i, layer in enumerate(layers) if layer.type == "Interp"]
    if not halving or not doubling:
        return range(len(layers))
    return {*range(halving[0]), *range(doubling[-1] + 1, len(layers))}
