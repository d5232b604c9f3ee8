"""Integer codes and scales of a weight as MNN reads them.

Source: MNN, source/core/IDSTEncoder.hpp (writes) and ConvolutionCommon.cpp (reads): dimensions, the table of possible
codes, then an index of `bits` a weight, the most significant bit first.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...quantize.codes import Codes

_WIDE: Final = 2**16  # dimensions from here on would need another form, which no weight of these families does


def header(rows: int, columns: int, bits: int) -> bytes:
    """What comes before the indices of a weight [rows, columns]."""
    if max(rows, columns) >= _WIDE:
        raise ValueError(f"a weight of {rows} x {columns} does not fit MNN's 16 bits a dimension")
    table = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.int8)
    return struct.pack("<BHHB", 2, rows, columns, 2**bits % 256) + table.tobytes()


def encode(codes: Codes, bits: int) -> bytes:
    """`IDSTQuan.buffer` of type 1 for a weight [O, ...]."""
    rows = codes.values.reshape(codes.values.shape[0], -1)
    indices: NDArray[Any] = (rows.reshape(-1) + np.int16(2 ** (bits - 1))).astype(np.uint8)
    if bits == 4:  # as below, without eight bytes a weight
        indices = np.append(indices, np.uint8(0)) if indices.size % 2 else indices
        indices = np.bitwise_or(indices[::2] << 4, indices[1::2], dtype=np.uint8)
    elif bits != 8:
        indices = np.packbits(np.unpackbits(indices[:, None], axis=1)[:, 8 - bits :])
    return header(rows.shape[0], rows.shape[1], bits) + indices.tobytes()


def decode(buffer: bytes, shape: tuple[int, int]) -> NDArray[np.int8]:
    """The codes [O, K] of a buffer of 8 bits, as MNN's converter writes it.

    Raises:
        ValueError: it is of another form or shape.
    """
    start = header(*shape, 8)
    if not buffer.startswith(start) or len(buffer) != len(start) + shape[0] * shape[1]:
        raise ValueError(f"{buffer[:6].hex()} and {len(buffer)} bytes are no codes of {shape[0]} x {shape[1]}")
    return (np.frombuffer(buffer, np.uint8, offset=len(start)) ^ 0x80).view(np.int8).reshape(shape)
