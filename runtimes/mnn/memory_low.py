"""What MNN computes wrongly with Memory_Low, read from a model's file.

With Memory_Low, MNN multiplies integer weights as they are. It takes the scales of an output channel for those of
blocks of input channels, each with its whole kernel, and packs a block in units of 4 (dot products), 8 (i8mm) or 16
(neither) channels: source/backend/cpu/compute/ConvInt8TiledExecutor.cpp, MNN 3.6.1. Nothing checks that the blocks are
such; where they are not it reads other weights, and memory past the end of its buffers. docs/decisions/0102.
"""

from __future__ import annotations

from typing import Final

from ...stages.artifacts import TargetModel
from .arithmetic import ARITHMETICS, GROUP_CHANNELS
from .mnn_file import MnnFile

# In float16 its kernel for one row of 4-bit weights (a time embedding) starts with so many of a block, whether there
# are as many or not. Wrong at 16 and 24, right at 32 and 48: measured.
_LEAST: Final = 32
_LINEAR: Final = "__matmul_converted"  # MNN's suffix for linear layers

_LOW: Final = tuple(each for each in ARITHMETICS if each.options.get("memory") == "Memory_Low")


def unsupported(model: TargetModel) -> dict[str, str]:
    """Arithmetics in which MNN computes nonsense of `model` or ends the process -> why.

    Raises:
        ModelError: the file is damaged.
    """
    file = MnnFile(model.folder / model.files[0])
    layers = file.blocked()
    cut = [each for each in layers if each.blocks > 1 and each.channels % (each.blocks * GROUP_CHANNELS)]
    if not cut and _has_single_place(model, file.halvings()):
        cut = [each for each in layers if each.blocks > 1 and each.kernel > 1]
    short = [
        each
        for each in layers
        if each.bits == 4 and each.name.endswith(_LINEAR) and each.channels < each.blocks * _LEAST
    ]
    found = {}
    for arithmetic in _LOW:
        wrong = cut or (short if arithmetic.expects == "float16" else [])
        if wrong:
            first = wrong[0]
            found[arithmetic.name] = (
                f"MNN takes the groups of weights of {len(wrong)} layers for others, the first is {first.name!r}: "
                f"{first.blocks} groups in {first.channels} channels of {first.kernel} weights"
            )
    return found


def _has_single_place(model: TargetModel, halvings: int) -> bool:
    """Whether a feature map gets as small as 1 x 1, where groups of 3 x 3 convolutions are wrong on every processor."""
    maps = [spec.shape[2:] for spec in model.inputs if len(spec.shape) == 4]
    return any(max(sides) <= 2**halvings for sides in maps)
