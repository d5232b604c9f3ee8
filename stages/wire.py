"""Protobuf's wire format, read strictly: https://protobuf.dev/programming-guides/encoding/

A runtime and this reader must see the same in a file, or a hostile one shows each of them something else. So what
parsers are known to disagree about (keys of more than 32 bits, groups, whatever ends too soon) is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

MAX_BYTES: Final = 2**31 - 1  # of a message, protobuf's own limit
VARINT, BYTES = 0, 2  # wire types
_FIXED: Final = {1: 8, 5: 4}  # wire type -> bytes
_LONGEST_KEY: Final = 5  # bytes
_LONGEST: Final = 10


def fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """(field number, wire type, value) in the order of the file; a varint is 0..2^64-1.

    Raises:
        ValueError: these are not the bytes of a message.
    """
    place, end = 0, len(message)
    while place < end:
        key, place = _varint(message, place, _LONGEST_KEY)
        number, kind = key >> 3, key & 7
        if not 0 < number < 2**29:
            raise ValueError(f"field number {number}")
        value: int | memoryview
        if kind == VARINT:
            value, place = _varint(message, place, _LONGEST)
        else:
            size = _FIXED.get(kind, -1)
            if kind == BYTES:
                size, place = _varint(message, place, _LONGEST)
            if not 0 <= size <= end - place:
                raise ValueError(f"field {number} of wire type {kind} and {size} bytes at byte {place} of {end}")
            value = message[place : place + size]
            place += size
        yield number, kind, value


def varints(packed: memoryview) -> Iterator[int]:
    """The numbers of a packed repeated field.

    Raises:
        ValueError: the last one is cut.
    """
    place = 0
    while place < len(packed):
        value, place = _varint(packed, place, _LONGEST)
        yield value


def _varint(message: memoryview, place: int, longest: int) -> tuple[int, int]:
    """The number at `place`, and where what follows it begins."""
    value = 0
    for index, byte in enumerate(message[place : place + longest]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value & (2**64 - 1), place + index + 1
    raise ValueError(f"a number without an end at byte {place}")
