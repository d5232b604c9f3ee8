"""Headers of safetensors files, checked against every rule of the format, and tensors read by offset.

Format: https://github.com/huggingface/safetensors#format. A file is an 8-byte little-endian length N, N bytes
of JSON (name -> dtype, shape, data_offsets), then the tensors' bytes without holes or overlaps.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from ..stages.artifacts import StoredTensor
from ..stages.errors import CheckpointError
from ..stages.plain_file import open_plain
from .file_kind import describe_foreign

MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit, against JSON that exhausts memory
MAX_RANK: Final = 64  # numpy's
DTYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
    }
)
"""The format's word -> numpy's, or that of ml_dtypes."""


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read and check the header of `file`: name -> tensor, in the order of their bytes. No tensor data is read.

    Raises:
        CheckpointError: the file is not safetensors (and what it is instead), is cut short, or breaks a rule.
    """
    try:
        with open_plain(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            header, data_start = _header_json(file, stream, size)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read: {error.strerror}", hint="check the path and its rights"
        ) from error
    _metadata(file, header)
    tensors = [_stored(file, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.bytes))
    _check_layout(file, tensors, data_start, size)
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(file: Path) -> dict[str, str]:
    """The header's `__metadata__`, free text by free text key; empty where there is none.

    Raises:
        CheckpointError: as `read_header`.
    """
    try:
        with file.open("rb") as stream:
            return _metadata(file, _header_json(file, stream, file.stat().st_size)[0])
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read: {error.strerror}", hint="check the path and its rights"
        ) from error


def _metadata(file: Path, header: dict[str, Any]) -> dict[str, str]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(file, "__metadata__ is not a map from text to text")
    return metadata


def read_tensor(tensor: StoredTensor) -> NDArray[Any]:
    """Read one tensor, C-contiguous, in its stored dtype.

    Plain reads rather than a memory map: pages of a map count as resident memory of this process.
    """
    count = math.prod(tensor.shape)
    values = np.fromfile(tensor.file, dtype=dtype_of(tensor), count=count, offset=tensor.start)
    if values.size != count:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name!r} ends after {values.size} of {count} values: the file shrank",
            hint="do not change a checkpoint while it is converted",
        )
    values = values.reshape(tensor.shape)
    return np.ascontiguousarray(values.T) if tensor.transposed else values


def dtype_of(tensor: StoredTensor) -> np.dtype[Any]:
    """The dtype of the stored bytes: little-endian, and with what numpy lacks (bfloat16, float8)."""
    return _dtype(tensor.dtype)


def _dtype(name: str) -> np.dtype[Any]:
    if name.startswith(("bfloat", "float8")):
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return found
    return np.dtype(name).newbyteorder("<")


def _header_json(file: Path, stream: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    foreign = describe_foreign(file)
    if foreign is not None:
        raise CheckpointError(f"{file}: {foreign.what}, not safetensors", hint=foreign.hint)
    if size < 8:
        raise _broken(file, f"{size} bytes: even the 8-byte header length is cut short")
    length = int.from_bytes(stream.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise _broken(file, f"header length {length} is over the format's limit of {MAX_HEADER_BYTES} bytes")
    if 8 + length > size:
        raise _broken(file, f"the file ends at byte {size}, its header alone promises {8 + length}")
    raw = stream.read(length)
    if not raw.startswith(b"{"):
        raise _broken(file, f"the header starts with {raw[:1]!r}, not with '{{'")
    try:
        # ValueError covers bad UTF-8, bad JSON and duplicate keys; RecursionError, hostile nesting.
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"the header is not valid JSON: {error}") from error
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {twice!r} occurs twice")
    return found


def _stored(file: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    where = f"tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _broken(file, f"{where} lacks dtype, shape or data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{file}: {where} has dtype {entry['dtype']!r}", hint=f"known dtypes: {', '.join(DTYPES)}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if (
        not _whole_numbers(shape)
        or len(shape) > MAX_RANK
        or not _whole_numbers(offsets)
        or len(offsets) != 2
        or offsets[0] > offsets[1]
    ):
        raise _broken(file, f"{where} has shape {shape!r}, data_offsets {offsets!r}")
    dtype = _dtype(DTYPES[entry["dtype"]])
    length = offsets[1] - offsets[0]
    if math.prod(shape) * dtype.itemsize != length:
        raise _broken(file, f"{where}: shape {shape} of {dtype.name} does not fill its {length} bytes")
    return StoredTensor(file, name, dtype.name, tuple(shape), data_start + offsets[0], length)


def _whole_numbers(values: object) -> bool:
    # bool is an int to Python, and JSON's `true` is no size
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(file: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            kind = "overlaps what lies before it" if tensor.start < end else "leaves a hole before it"
            raise _broken(file, f"tensor {tensor.name!r} {kind} (byte {tensor.start}, expected {end})")
        end += tensor.bytes
    if size < end:
        raise _broken(file, f"weights end at byte {size}, header promises {end}")
    if size > end:
        raise _broken(file, f"{size - end} bytes follow the last tensor, which ends at byte {end}")


def _broken(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file}: damaged safetensors file: {why}", hint="download or save the file again")
