"""Integer codes and scales of a parameter as the bytes of a `.bin` file.

ncnn has no convolution on int8 weights with float activations, and four bits in two layers only, in a format that moved
between releases. So codes travel in the two oldest forms that it has, and plain layers of the graph (`low_bit.py`)
turn them into weights: docs/decisions/0035.
"""

from __future__ import annotations

from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from ...quantize.codes import Codes
from ...quantize.layer_ranges import Range
from ..nibbles import pack_nibbles
from .layout import Blob
from .slots import TAG_BOOK, TAG_FP16, TAG_FP32, TAG_INT8

CODES: Final = "codes"  # int8, one a byte
NIBBLES: Final = "nibbles"  # int8, two codes of four bits a byte
BOOK: Final = "book"  # 256 float32 and an index of 8 bits a weight: ncnn makes floats of it when it loads
NIBBLE_BOOK: Final = "nibble book"  # the same of bytes that hold two codes
SCALES: Final = "scales"  # float32 [O, G]
UP, DOWN = "up", "down"  # float16, the factors of a low-rank branch
BOOK_SCALES: Final = "book scales"  # the scales that are left over from a `BOOK`, or from a `UNIT`
MULTIPLIERS: Final = "multipliers"  # float32 [O]: what weights are multiplied by to be codes, 1 / scale
UNIT: Final = "unit"  # float32 [1]: the same of a whole tensor, 1 / `unit`
INPUT_MULTIPLIER: Final = "input multiplier"  # float32 [1]: the same of what enters the weight's layer

_TOP: Final = 127


def encode(stream: BinaryIO, blob: Blob, codes: Codes, entering: Range | None = None) -> None:
    """Write what `blob.kind` says of `codes` at an offset that is a multiple of 4, tag and padding included.

    Args:
        entering: least and greatest value of the layer's input, where `blob.kind` is about it.
    """
    match blob.kind:
        case "codes":
            _write_bytes(stream, TAG_INT8, codes.values)
        case "nibbles":
            _write_bytes(stream, TAG_INT8, pack_nibbles(codes))
        case "book":
            _write_book(stream, codes.values, unit(codes))
        case "nibble book":
            _write_book(stream, pack_nibbles(codes), np.float32(1))
        case "scales" | "book scales":
            scales = codes.scales / unit(codes) if blob.kind == BOOK_SCALES else codes.scales
            if blob.slot.tagged:
                stream.write(TAG_FP32)
            stream.write(np.ascontiguousarray(scales, np.float32).data)
        case "up" | "down" if codes.branch is not None:
            factor = codes.branch.up if blob.kind == UP else codes.branch.down
            stream.write(TAG_FP16)
            stream.write(np.ascontiguousarray(factor).data)
            stream.write(bytes(-factor.nbytes % 4))
        case "multipliers":
            stream.write((1 / codes.scales).astype(np.float32).data)
        case "unit":
            stream.write((1 / unit(codes)).tobytes())
        case "input multiplier" if entering is not None:
            stream.write(input_multiplier(entering).tobytes())
        case kind:
            raise ValueError(f"{blob.name}: {kind!r} is not a form of codes")


def unit(codes: Codes) -> np.float32:
    """The power of two near the scales that a codebook takes over, without rounding.

    Bare codes make a layer's output 127 / max|w| times larger than the model's, beyond float16 on phones that compute
    in it.
    """
    return np.float32(2.0 ** np.floor(np.log2(np.median(codes.scales))))


def input_multiplier(entering: Range) -> np.float32:
    """What an input is multiplied by before it is rounded: its largest magnitude becomes 127, zero stays zero."""
    peak = max(abs(entering[0]), abs(entering[1]))
    return np.float32(_TOP / peak if peak > _TOP * np.finfo(np.float32).tiny else 1.0)  # nothing but zeros: any will do


def _write_bytes(stream: BinaryIO, tag: bytes, values: NDArray[np.int8]) -> None:
    stream.write(tag)
    stream.write(np.ascontiguousarray(values).data)
    stream.write(bytes(-values.size % 4))


def _write_book(stream: BinaryIO, values: NDArray[np.int8], unit: np.float32) -> None:
    stream.write(TAG_BOOK)
    stream.write((np.arange(-128, 128, dtype=np.float32) * unit).data)
    stream.write((np.ascontiguousarray(values).view(np.uint8) ^ 0x80).data)  # index = code + 128
    stream.write(bytes(-values.size % 4))
