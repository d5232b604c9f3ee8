"""ncnn's `Option` fields that decide in which numbers it computes. Source: Tencent/ncnn, `src/option.h`.

Winograd and convolution as one matrix product are no part of this: each layer of a bundle says itself where they are
off (`masks.py`), so that an app has no option to set for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..arithmetic import FLOAT32, VULKAN, Arithmetic, arithmetic_named

_REDUCED: Final = (
    "use_fp16_packed",
    "use_fp16_storage",
    "use_fp16_arithmetic",
    "use_bf16_packed",
    "use_bf16_storage",
)
_STORED: Final = ("use_fp16_packed", "use_fp16_storage")
_COMPUTED: Final = (*_STORED, "use_fp16_arithmetic")
_BRAIN: Final = ("use_bf16_packed", "use_bf16_storage")


def _options(*reduced: str) -> dict[str, bool]:
    return {option: option in reduced for option in _REDUCED}


_VULKAN: Final = {"use_vulkan_compute": True}

# On Vulkan, a net must have its options before it loads a graph.
ARITHMETICS: Final = (
    Arithmetic(FLOAT32, _options(), "float32", rank=5),
    Arithmetic("fp16-storage", _options(*_STORED), "float16 stored", rank=3),
    Arithmetic("fp16", _options(*_COMPUTED), "float16", rank=2),
    Arithmetic("defaults", {}, "float16", is_default=True, rank=1),
    Arithmetic("bf16", _options(*_BRAIN), "bfloat16 stored", rank=4),
    Arithmetic("vulkan-float32", {**_VULKAN, **_options()}, "float32", device=VULKAN, rank=3),
    Arithmetic("vulkan-fp16-storage", {**_VULKAN, **_options(*_STORED)}, "float16 stored", device=VULKAN, rank=2),
    Arithmetic("vulkan-fp16", {**_VULKAN, **_options(*_COMPUTED)}, "float16", is_default=True, device=VULKAN, rank=1),
)

SELF_TESTS: Final[Mapping[str, bool]] = {
    **_options(),
    "use_vulkan_compute": False,
    "use_int8_inference": True,
    "use_packing_layout": True,
    "use_winograd_convolution": False,
    "use_sgemm_convolution": True,
}
"""Every option that decides what a self-test of ncnn finds, whatever a build of ncnn has for a default."""


def net_with(options: Mapping[str, Any], threads: int) -> Any:
    """An empty `ncnn.Net` with these options."""
    import ncnn

    net: Any = ncnn.Net()
    net.opt.num_threads = threads
    for option, value in options.items():
        setattr(net.opt, option, value)
    return net


def options_of(name: str) -> Mapping[str, Any]:
    """The options of an arithmetic by its name, float32's if it has none.

    Raises:
        UsageError: there is none of that name.
    """
    return arithmetic_named(name or FLOAT32, ARITHMETICS, "ncnn").options
