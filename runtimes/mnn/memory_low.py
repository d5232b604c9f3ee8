"""What MNN computes wrongly with Memory_Low, read from a model's file.

With Memory_Low, MNN multiplies integer weights as they are. It takes the scales of an output channel for those of
blocks of input channels, each with its whole kernel, and packs a block in units of 4 (dot products), 8 (i8mm) or 16
(neither) channels: source/backend/cpu/compute/ConvInt8TiledExecutor.cpp, MNN 3.6.1. Nothing checks that the blocks are
such; where they are not it reads other weights, and memory past the end of its buffers. docs/decisions/0102.
"""

from __future__ import annotations

from typing import Final

from ...pipeline.artifacts import TargetModel
from .arithmetic import ARITHMETICS
from .mnn_file import MnnFile

GROUP_CHANNELS: Final = 16
"""Input channels of which a group of weights holds a multiple: the largest unit in which MNN packs them."""

_LOW: Final = tuple(each.name for each in ARITHMETICS if each.options.get("memory") == "Memory_Low")


def unsupported(model: TargetModel) -> dict[str, str]:
    """Arithmetics in which MNN computes nonsense of `model` or ends the process -> why.

    Raises:
        ModelError: the file is damaged.
    """
    wrong = [
        each
        for each in MnnFile(model.folder / model.files[0]).blocked()
        if each.blocks > 1 and (each.channels % each.blocks or each.channels // each.blocks % GROUP_CHANNELS)
    ]
    if not wrong:
        return {}
    first = wrong[0]
    why = (
        f"{len(wrong)} layers have groups of weights that do not hold whole multiples of {GROUP_CHANNELS} input "
        f"channels, the first is {first.name!r}: {first.blocks} groups in {first.channels} channels of "
        f"{first.kernel} weights"
    )
    return dict.fromkeys(_LOW, why)
