"""What single layers are kept from, whatever an app's options are: a layer's parameter 31, a sum of bits.

An app may leave ncnn's options alone, and on AArch64 that means float16 in memory, float16 products and sums, and
Winograd. Source: Tencent/ncnn, `src/net.cpp`, `get_masked_option` and `convert_layout`.

A layer that is kept from 16-bit storage is handed its inputs as they are: one that another layer has stored in 16 bits
would be read as if it were float32. So such a layer may only follow its like, and layers that make float32 under every
option because ncnn has no other form of them. docs/decisions/0101.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ...stages.errors import ExportError
from .param import Layer

KEY: Final = 31

NO_FP16_ARITHMETIC: Final = 1
NO_FP16_STORAGE: Final = 2
NO_BF16_STORAGE: Final = 4
NO_VULKAN: Final = 16
NO_SGEMM: Final = 32
NO_WINOGRAD: Final = 64

EXACT: Final = NO_FP16_ARITHMETIC | NO_FP16_STORAGE | NO_BF16_STORAGE | NO_VULKAN
"""In float32 on the CPU. Vulkan is among them because it uploads all blobs, integers too, in the app's numbers."""

AS_FLOAT32: Final = "Squeeze"
"""A layer that changes nothing, and that ncnn has for float32 only: its output is float32 under every option."""

_FLOAT32_MAKERS: Final = ("Input", "MemoryData", "Embed", AS_FLOAT32)
_TO, _FLOAT32 = 1, 1  # of Cast


def is_exact(layer: Layer) -> bool:
    """Whether no option changes what a layer computes, or the bits of integers that pass through it."""
    return layer.number(KEY) & EXACT == EXACT


def check_exact(layers: Iterable[Layer], integers: Iterable[str]) -> None:
    """Refuse a graph that is right under some of ncnn's options only.

    Args:
        integers: inputs of the graph that are int32.
    Raises:
        ExportError: integers enter a layer that may round them, or an exact layer follows one that may store 16 bits.
    """
    whole = set(integers)
    float32: set[str] = set()
    for layer in layers:
        if is_exact(layer):
            if loose := [blob for blob in layer.inputs if blob not in float32]:
                raise ExportError(
                    f"ncnn's {layer.type} {layer.name} would read {loose[0]} as float32, and an app's options may "
                    "store it in 16 bits"
                )
            whole.update(layer.outputs if whole.intersection(layer.inputs) else ())
        elif layer.type != "Embed" and (rounded := whole.intersection(layer.inputs)):
            raise ExportError(
                f"ncnn's {layer.type} {layer.name} may round the integers {min(rounded)} to 16 bits before an Embed"
            )
        casts = layer.type == "Cast" and layer.number(_TO) == _FLOAT32
        if casts or is_exact(layer) or layer.type in _FLOAT32_MAKERS:
            float32.update(layer.outputs)
