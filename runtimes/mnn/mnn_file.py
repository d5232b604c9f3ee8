"""Reading and mending `.mnn` files, which are flatbuffers.

Field numbers are those of MNN's schema (schema/default/MNN.fbs, Tensor.fbs, CaffeOp.fbs); the flatbuffer format
keeps them stable over versions. MNN's own way to look into a model is a JSON dump with every weight in it.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from flatbuffers import Builder, number_types
from flatbuffers.table import Table
from numpy.typing import NDArray

from ...stages.artifacts import TensorSpec
from ...stages.errors import ModelError

_NET_OPS, _NET_OUTPUTS, _NET_TENSORS, _NET_UUID = 3, 4, 7, 11
_OP_INPUTS, _OP_MAIN, _OP_NAME, _OP_OUTPUTS, _OP_TYPE = 0, 2, 3, 4, 5
_BLOB_DIMS, _BLOB_FORMAT, _BLOB_DTYPE, _BLOB_BYTES, _BLOB_FLOATS = 0, 1, 2, 3, 7
_BLOB_FIELDS: Final = 10
_INPUT_DIMS, _INPUT_DTYPE = 0, 1
_CONST, _INPUT, _PLUGIN, _EXTRA = 11, 34, 256, 512  # OpType
_EXTERNAL: Final = {11: 9, 12: 6, 13: 6, 603: 5}  # OpType -> field with [offset, bytes...] in the weight file
CONVOLUTIONS: Final = (12, 13)  # OpType
_CONVOLUTION_COMMON, QUANTISED = 0, 3  # of Convolution2D
_COMMON_FIELDS: Final = (2, 3, 10, 11)  # of Convolution2DCommon: kernelX, kernelY, outputCount, inputCount
QUANTISED_TYPE, _INTEGERS = 2, 1  # IDSTQuan.type, and its value for integers
_STRIDE: Final = 4  # of Convolution2DCommon: strideX
_QUANTISED_BITS: Final = 7  # IDSTQuan.aMaxOrBits
_SCALE_BYTES: Final = 4
_FLOAT, _HALF = 1, 19  # DataType
_DTYPES: Final = {1: "float32", 3: "int32", 9: "int64", 19: "float16"}
_ALIGNMENT: Final = 16
# A file can point at the same bytes a million times, so what is copied of it has to be small: seen are 60 and 5.
_LONGEST_NAME: Final = 2**10  # bytes
_LONGEST_PLACE: Final = 2**6  # numbers: dimensions, or an offset and the lengths that follow it
_DAMAGE: Final = (struct.error, IndexError, ValueError, TypeError)  # what following a wrong offset ends with


@dataclass(frozen=True)
class Wired:
    """An operation with the names of the tensors that it reads and makes."""

    name: str
    type: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Blocked:
    """A convolution or linear layer of integer weights: `blocks` scales an output channel."""

    name: str
    channels: int  # of its input
    kernel: int  # weights an input and output channel
    blocks: int
    bits: int


@dataclass(frozen=True)
class _Op:
    table: Table
    type: int
    name: str
    main: Table | None


@dataclass(frozen=True)
class ExternalData:
    """Where an operator's weights lie in the weight file, and where in the `.mnn` that is written."""

    name: str
    type: int
    main: Table
    place: int  # byte in the `.mnn` of the int64 `start`, which `sizes` follow
    start: int
    sizes: tuple[int, ...]  # bytes of what follows each other from `start` on: weight, scales, bias, ...


class MnnFile:
    """A `.mnn` file, and its `.mnn.weight` if it has one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            (root,) = struct.unpack_from("<I", self._bytes, 0)
            self._net = Table(self._bytes, root)
            self._ops = tuple(self._read_ops())
            self.inputs = tuple(self._input(op) for op in self._ops if op.type == _INPUT)
            self.outputs = tuple(self._strings(self._net, _NET_OUTPUTS))
            self.weight_bytes = self._weight_bytes()  # size of `.mnn.weight`; 0: the weights are in the `.mnn`
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}") from error
        except _DAMAGE as error:
            raise self._damaged() from error

    @property
    def weight_file(self) -> Path:
        """Where MNN looks for the weights of a model that keeps them in a file of their own."""
        return self.path.with_name(f"{self.path.name}.weight")

    def check_weights(self) -> None:
        """Raise `ModelError` unless the weight file has exactly the bytes that the model reads.

        MNN itself loads a model without its weights, and computes ±3.4e38 with them.
        """
        found = self.weight_file.stat().st_size if self.weight_file.is_file() else 0
        if found != self.weight_bytes:
            raise ModelError(
                f"{self.weight_file} has {found} bytes and its model reads {self.weight_bytes}",
                hint="the two files belong together: fetch or convert them again",
            )

    def unconverted(self) -> list[str]:
        """Names of the nodes that MNN's converter did not know; the runtime would need plug-ins for them."""
        return [op.name for op in self._ops if op.type in (_EXTRA, _PLUGIN)]

    def wires(self) -> tuple[Wired, ...]:
        """The operations in the order of execution."""
        tensors = tuple(self._strings(self._net, _NET_TENSORS))

        def names(op: _Op, field: int) -> tuple[str, ...]:
            return tuple(tensors[index] for index in self._vector(op.table, field, np.int32))

        return tuple(Wired(op.name, op.type, names(op, _OP_INPUTS), names(op, _OP_OUTPUTS)) for op in self._ops)

    def half_constants(self) -> dict[str, NDArray[np.float16]]:
        """The constants (not weights of a convolution or Linear) that are stored as float16."""
        try:
            return {
                op.name: self._vector(op.main, _BLOB_BYTES, np.uint8).view(np.float16)
                for op in self._ops
                if op.type == _CONST and op.main is not None and self._number(op.main, _BLOB_DTYPE, _FLOAT) == _HALF
            }
        except _DAMAGE as error:
            raise self._damaged() from error

    def store_as_float32(self, constants: Mapping[str, NDArray[np.float32]]) -> None:
        """Replace constants by float32 ones of the same shape. Invalidates this object: open the file again.

        New tables go to the end of the file and the operators point there, so nothing else moves.
        """
        end, tail, patches = len(self._bytes), bytearray(), []
        for op in self._ops:
            if op.type != _CONST or op.main is None or op.name not in constants:
                continue
            tail += bytes(-(end + len(tail)) % _ALIGNMENT)
            blob = self._blob(op.main, constants[op.name])
            target = end + len(tail) + struct.unpack_from("<I", blob, 0)[0]
            place = op.table.Pos + op.table.Offset(_slot(_OP_MAIN))
            patches.append((place, target - place))
            tail += blob
        self._bytes.close()
        with self.path.open("r+b") as file:
            for place, offset in patches:
                file.seek(place)
                file.write(struct.pack("<I", offset))
            file.seek(end)
            file.write(tail)

    def external(self) -> list[ExternalData]:
        """Where operators keep weights in the weight file, in its order."""
        found = []
        for op in self._ops:
            offset = op.main.Offset(_slot(_EXTERNAL[op.type])) if op.main is not None and op.type in _EXTERNAL else 0
            if op.main is not None and offset and op.main.VectorLen(offset):
                place = op.main.Vector(offset)
                numbers = np.frombuffer(self._bytes, np.int64, op.main.VectorLen(offset), place).tolist()
                found.append(ExternalData(op.name, op.type, op.main, place, numbers[0], tuple(numbers[1:])))
        return sorted(found, key=lambda data: data.start)

    def blocked(self) -> list[Blocked]:
        """The layers of integer weights whose scales lie in the weight file."""
        found = []
        try:
            for data in self.external():
                common = self.table(data.main, _CONVOLUTION_COMMON) if data.type in CONVOLUTIONS else None
                quantised = self.table(data.main, QUANTISED) if common is not None else None
                if common is None or quantised is None or self._number(quantised, QUANTISED_TYPE, 0) != _INTEGERS:
                    continue
                kernel_x, kernel_y, outputs, inputs = (self._number(common, field, 1) for field in _COMMON_FIELDS)
                blocks = data.sizes[1] // (_SCALE_BYTES * outputs)
                bits = self._number(quantised, _QUANTISED_BITS, 8)
                found.append(Blocked(data.name, inputs, kernel_x * kernel_y, blocks, bits))
        except (*_DAMAGE, ZeroDivisionError) as error:
            raise self._damaged() from error
        return found

    def halvings(self) -> int:
        """How many convolutions leave out every other place."""
        try:
            commons = [
                self.table(op.main, _CONVOLUTION_COMMON)
                for op in self._ops
                if op.type in CONVOLUTIONS and op.main is not None
            ]
            return sum(common is not None and self._number(common, _STRIDE, 1) == 2 for common in commons)
        except _DAMAGE as error:
            raise self._damaged() from error

    def table(self, table: Table, field: int) -> Table | None:
        """A table inside a table."""
        offset = table.Offset(_slot(field))
        return Table(self._bytes, table.Indirect(table.Pos + offset)) if offset else None

    def patch(self, places: Mapping[int, bytes]) -> None:
        """Overwrite bytes of the file in place. Invalidates this object: open it again."""
        self._bytes.close()
        with self.path.open("r+b") as file:
            for place, values in places.items():
                file.seek(place)
                file.write(values)

    def stamp(self) -> str:
        """Replace the model's random uuid by one made of its content, and return it. Invalidates this object."""
        place = self._net.Indirect(self._net.Pos + self._net.Offset(_slot(_NET_UUID)))
        (length,) = struct.unpack_from("<I", self._bytes, place)
        start = place + 4
        digest = hashlib.sha256(self._bytes[:start])
        digest.update(self._bytes[start + length :])
        if self.weight_bytes:
            with self.weight_file.open("rb") as weights:
                digest.update(hashlib.file_digest(weights, "sha256").digest())
        stamp = str(uuid.uuid5(uuid.NAMESPACE_OID, digest.hexdigest()))  # RFC 9562 section 5.5: made by a hash
        if length != len(stamp):
            raise ModelError(f"{self.path}: its uuid has {length} characters, not {len(stamp)}", hint="report this")
        self._bytes.close()
        with self.path.open("r+b") as file:
            file.seek(start)
            file.write(stamp.encode())
        return stamp

    def _damaged(self) -> ModelError:
        return ModelError(f"{self.path} is not a whole MNN model", hint="fetch or convert it again")

    def _read_ops(self) -> Iterator[_Op]:
        offset = self._net.Offset(_slot(_NET_OPS))
        start = self._net.Vector(offset)
        for index in range(self._net.VectorLen(offset)):
            table = Table(self._bytes, self._net.Indirect(start + 4 * index))
            name = table.Offset(_slot(_OP_NAME))
            main = table.Offset(_slot(_OP_MAIN))
            yield _Op(
                table,
                self._number(table, _OP_TYPE, 0),
                self._text(table, table.Pos + name) if name else "",
                Table(self._bytes, table.Indirect(table.Pos + main)) if main else None,
            )

    def _input(self, op: _Op) -> TensorSpec:
        if op.main is None:
            raise ValueError(op.name)
        dims = tuple(self._place(op.main, _INPUT_DIMS, np.int32))
        dtype = self._number(op.main, _INPUT_DTYPE, _FLOAT)
        return TensorSpec(op.name, _DTYPES.get(dtype, f"DataType {dtype}"), dims)

    def _weight_bytes(self) -> int:
        end = 0
        for op in self._ops:
            if op.main is not None and op.type in _EXTERNAL:
                place = self._place(op.main, _EXTERNAL[op.type], np.int64)
                if any(number < 0 for number in place):
                    raise ValueError(f"weights at {place}")
                end = max(end, sum(place))
        return end

    def _blob(self, old: Table, values: NDArray[np.float32]) -> bytes:
        builder = Builder(values.nbytes + 128)
        floats = builder.CreateNumpyVector(np.ravel(values))
        dims = self._vector(old, _BLOB_DIMS, np.int32)
        dims_vector = builder.CreateNumpyVector(dims) if len(dims) else 0
        builder.StartObject(_BLOB_FIELDS)
        builder.PrependUOffsetTRelativeSlot(_BLOB_FLOATS, floats, 0)
        builder.PrependUOffsetTRelativeSlot(_BLOB_DIMS, dims_vector, 0)
        builder.PrependInt32Slot(_BLOB_DTYPE, _FLOAT, 0)
        builder.PrependInt8Slot(_BLOB_FORMAT, self._number(old, _BLOB_FORMAT, 0, number_types.Int8Flags), 0)
        builder.Finish(builder.EndObject())
        return bytes(builder.Output())

    def _number(self, table: Table, field: int, default: int, kind: Any = number_types.Int32Flags) -> int:
        offset = table.Offset(_slot(field))
        return int(table.Get(kind, table.Pos + offset)) if offset else default

    def _vector(self, table: Table, field: int, dtype: Any) -> NDArray[Any]:
        offset = table.Offset(_slot(field))
        if not offset:
            return np.empty(0, dtype)
        return np.frombuffer(self._bytes, dtype, table.VectorLen(offset), table.Vector(offset)).copy()

    def _text(self, table: Table, place: int) -> str:
        (length,) = struct.unpack_from("<I", self._bytes, table.Indirect(place))
        if length > _LONGEST_NAME:
            raise ValueError(f"a name of {length} bytes")
        return str(table.String(place).decode())

    def _place(self, table: Table, field: int, dtype: Any) -> list[int]:
        offset = table.Offset(_slot(field))
        if offset and table.VectorLen(offset) > _LONGEST_PLACE:
            raise ValueError(f"a place of {table.VectorLen(offset)} numbers")
        return [int(number) for number in self._vector(table, field, dtype)]

    def _strings(self, table: Table, field: int) -> Iterator[str]:
        offset = table.Offset(_slot(field))
        for index in range(table.VectorLen(offset) if offset else 0):
            yield self._text(table, table.Vector(offset) + 4 * index)


def _slot(field: int) -> int:
    """Place of a field in a vtable, flatbuffers' internals: two sizes of 2 bytes come first."""
    return 4 + 2 * field
