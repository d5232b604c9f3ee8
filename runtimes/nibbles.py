"""Two 4-bit codes a byte, so that arithmetic on numbers takes them apart: for runtimes that cannot shift bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..quantize.codes import Codes
from ..quantize.scheme import Scheme


def are_halved(scheme: Scheme, columns: int) -> bool:
    """Whether two codes of a row of `columns` share a byte."""
    return scheme.weight_bits <= 4 and columns % 2 == 0


def pack_nibbles(codes: Codes) -> NDArray[np.int8]:
    """[O, K / 2]: a byte is 16 * high + (low + 8); the high codes are the first half of a row, the low ones the second.

    As a number, floor(byte / 16) is the high code, in any arithmetic that is exact to 8 bits.
    """
    rows = codes.values.reshape(codes.values.shape[0], -1)
    half = rows.shape[1] // 2
    return (16 * rows[:, :half].astype(np.int16) + rows[:, half:] + 8).astype(np.int8)
