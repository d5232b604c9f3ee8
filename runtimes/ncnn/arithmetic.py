"""ncnn's `Option` fields that decide in which numbers it computes. Source: Tencent/ncnn, `src/option.h`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..arithmetic import FLOAT32, Arithmetic, Computed

_REDUCED: Final = (
    "use_fp16_packed",
    "use_fp16_storage",
    "use_fp16_arithmetic",
    "use_bf16_packed",
    "use_bf16_storage",
)

# Convolution as one matrix product unfolds its input ninefold. On the feature maps of a VAE, as large as the picture,
# that takes 6.4 GB for 1.7 in the decoder at 512x512; on a UNet's it is cheap, and a third faster.
_VAE: Final[Mapping[str, Mapping[str, Any]]] = {
    half: {"use_sgemm_convolution": False} for half in ("vae_decoder", "vae_encoder")
}


def _arithmetic(name: str, expects: Computed, *reduced: str, winograd: bool, rank: int) -> Arithmetic:
    options = {option: option in reduced for option in _REDUCED}
    return Arithmetic(name, {**options, "use_winograd_convolution": winograd}, expects, _VAE, rank=rank)


_STORED: Final = ("use_fp16_packed", "use_fp16_storage")
_COMPUTED: Final = (*_STORED, "use_fp16_arithmetic")
_BRAIN: Final = ("use_bf16_packed", "use_bf16_storage")

# Winograd convolution takes 10.7 GB for 5.0 in SD 1.5's UNet, and costs 3 to 14 dB.
ARITHMETICS: Final = (
    _arithmetic(FLOAT32, "float32", winograd=False, rank=7),
    _arithmetic("float32-winograd", "float32", winograd=True, rank=6),
    _arithmetic("fp16-storage", "float16 stored", *_STORED, winograd=False, rank=4),
    _arithmetic("fp16-storage-winograd", "float16 stored", *_STORED, winograd=True, rank=3),
    _arithmetic("fp16", "float16", *_COMPUTED, winograd=False, rank=2),
    Arithmetic("defaults", {}, "float16", is_default=True, rank=1),  # float16 and Winograd
    _arithmetic("bf16", "bfloat16 stored", *_BRAIN, winograd=False, rank=5),
)
