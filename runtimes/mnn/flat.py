"""A whole `.mnn` as plain values, and back to the very bytes that MNN's converter writes.

MNN writes with flatbuffers' object interface, which leaves no choice: children before their table in the order of the
schema, numbers by falling size, every default written out. So `pack(read(bytes)) == bytes` for a file of the
converter, and whoever changes values in between can have that proven for the file at hand before trusting it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from flatbuffers import Builder
from flatbuffers.table import Table
from numpy.typing import NDArray

from .schema import MAINS, TABLES

Values = dict[str, Any]  # of a table: field -> number, str, Values, list of str or Values, or array; absent: no entry

_NUMBERS: Final = {  # kind -> bytes, struct format
    "i8": (1, "<b"), "u8": (1, "<B"), "i32": (4, "<i"), "u32": (4, "<I"), "i64": (8, "<q"), "f32": (4, "<f"),
}  # fmt: skip
_DTYPES: Final = {
    "[i8]": "<i1", "[u8]": "<u1", "[u16]": "<u2", "[i32]": "<i4", "[u32]": "<u4", "[i64]": "<i8", "[f32]": "<f4",
}  # fmt: skip


class UnknownFormError(Exception):
    """A file uses a part of MNN's schema that `schema` leaves out. Never leaves this folder."""


def read(data: bytes) -> Values:
    """The tables of a `.mnn`.

    Raises:
        UnknownFormError: one of them, or a field, is not in `schema`.
    """
    (root,) = struct.unpack_from("<I", data, 0)
    return _read(Table(data, root), "Net")


def _read(table: Table, name: str) -> Values:
    (size,) = struct.unpack_from("<H", table.Bytes, table.Pos - struct.unpack_from("<i", table.Bytes, table.Pos)[0])
    fields = TABLES[name]
    if (size - 4) // 2 > len(fields):
        raise UnknownFormError(f"a {name} with {(size - 4) // 2} fields")
    values: Values = {}
    for number, (field, kind) in enumerate(fields):
        offset = table.Offset(4 + 2 * number)
        if offset:
            main = MAINS.get(values.get("main_type", 0), "None")
            values[field] = _value(table, table.Pos + offset, main if kind == "main?" else kind, f"{name}.{field}")
    return values


def _value(table: Table, place: int, kind: str, where: str) -> Any:
    if kind in _NUMBERS:
        return struct.unpack_from(_NUMBERS[kind][1], table.Bytes, place)[0]
    target = table.Indirect(place)
    if kind in TABLES:
        return _read(Table(table.Bytes, target), kind)
    (length,) = struct.unpack_from("<I", table.Bytes, target)
    if kind == "str":
        return bytes(table.Bytes[target + 4 : target + 4 + length]).decode()
    if kind in _DTYPES:
        return np.frombuffer(table.Bytes, _DTYPES[kind], length, target + 4)
    inner = kind[1:-1]
    if inner != "str" and inner not in TABLES:
        raise UnknownFormError(f"mnnconvert wrote {where}, which is not known here")
    return [_value(table, target + 4 + 4 * index, inner, where) for index in range(length)]


def pack(net: Values) -> bytes:
    """The bytes of a `.mnn` with these tables, as MNN's converter would write them."""
    builder = Builder(1 << 20)
    builder.Finish(_pack(builder, net, "Net"))
    return bytes(builder.Output())


def _pack(builder: Builder, values: Mapping[str, Any], name: str) -> int:
    fields = TABLES[name]
    places: dict[str, int] = {}
    for field, kind in fields:
        if field in values and kind not in _NUMBERS:
            main = MAINS.get(values.get("main_type", 0), "None")
            places[field] = _place(builder, values[field], main if kind == "main?" else kind)
    builder.StartObject(len(fields))
    for size in (8, 4, 2, 1):
        for number, (field, kind) in reversed(tuple(enumerate(fields))):
            if field not in values or size != _NUMBERS.get(kind, (4, ""))[0]:
                continue
            if kind in _NUMBERS:
                _prepend(builder, size, _NUMBERS[kind][1], values[field])
            else:
                builder.PrependUOffsetTRelative(places[field])
            builder.Slot(number)
    return int(builder.EndObject())


def _prepend(builder: Builder, size: int, form: str, value: Any) -> None:
    builder.Prep(size, 0)
    builder.head -= size
    struct.pack_into(form, builder.Bytes, builder.Head(), value)


def _place(builder: Builder, value: Any, kind: str) -> int:
    if kind == "str":
        return int(builder.CreateString(value))
    if kind in _DTYPES:
        array: NDArray[Any] = np.ascontiguousarray(value, _DTYPES[kind])
        return int(builder.CreateNumpyVector(array)) if array.size else _empty(builder, array.itemsize)
    if kind in TABLES:
        return _pack(builder, value, kind)
    places = [_place(builder, item, kind[1:-1]) for item in value]
    builder.StartVector(4, len(places), 4)
    for place in reversed(places):
        builder.PrependUOffsetTRelative(place)
    return int(builder.EndVector())


def _empty(builder: Builder, size: int) -> int:
    builder.StartVector(size, 0, size)
    return int(builder.EndVector())
