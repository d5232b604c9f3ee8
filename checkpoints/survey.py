"""One streaming pass over a weight file: sha256 of it and of its tensors, largest magnitude, first NaN or infinity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import numpy as np
from pydantic import TypeAdapter, ValidationError

from ..stages.artifacts import StoredTensor
from ..stages.errors import CheckpointError, NoRoom
from .safetensors_file import dtype_of, read_header

CHUNK_BYTES: Final = 16 * 2**20
MEMO_VERSION: Final = 3  # +1 whenever a survey of equal bytes may say something else

# stored dtype -> (unsigned integers of its width, bits without the sign, bits of +infinity). IEEE 754 magnitudes
# order like their bit patterns, so one AND and one integer maximum find the largest value, infinities and NaN at
# memory speed for every width; numpy has no fast float16 arithmetic.
_PATTERNS: Final[Mapping[str, tuple[np.dtype[np.unsignedinteger[Any]], int, int]]] = {
    "float64": (np.dtype("<u8"), 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "float32": (np.dtype("<u4"), 0x7FFF_FFFF, 0x7F80_0000),
    "float16": (np.dtype("<u2"), 0x7FFF, 0x7C00),
    "bfloat16": (np.dtype("<u2"), 0x7FFF, 0x7F80),
}


@dataclass(frozen=True, slots=True)
class NonFinite:
    """The first tensor of a file that holds NaN or infinity."""

    tensor: str
    index: int  # of the first such value in the flattened tensor
    count: int  # in this tensor
    tensors: int  # how many tensors of the file hold any


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over a weight file found."""

    sha256: str
    abs_max: float  # over all finite tensors of a float dtype; 0 when there are none
    abs_max_tensor: str
    non_finite: NonFinite | None
    tensors: Mapping[str, str]  # `place_of` a tensor -> sha256 of its bytes


def place_of(tensor: StoredTensor) -> str:
    """Where a tensor's bytes lie in their file: what a survey lists them by."""
    return f"{tensor.start}+{tensor.bytes}"


def survey(file: Path, *, tensors: Sequence[StoredTensor] | None = None, memo: Path | None = None) -> Survey:
    """Read `file` once, in chunks of 16 MiB, or recall what an earlier pass over the unchanged file found.

    Args:
        file: a safetensors file, or any other with `tensors` in it.
        tensors: where they lie; None asks the safetensors header.
        memo: folder that remembers surveys by path, size, times and inode; None remembers nothing.
    Raises:
        CheckpointError: the file is damaged, or changed while it was read.
    """
    before = _identity(file)
    what = [before, sorted(map(place_of, tensors)) if tensors is not None else None]
    entry = memo / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()}.json" if memo is not None else None
    if entry is not None and (known := _recall(entry)) is not None:
        return known
    try:
        found = _one_pass(file, list(read_header(file).values()) if tensors is None else tensors)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}", hint="check the disk") from error
    if _identity(file) != before:
        raise CheckpointError(f"{file}: changed while it was read", hint="wait until the file is completely written")
    if entry is not None:
        _remember(entry, found)
    return found


def refuse_non_finite(file: Path, found: Survey) -> None:
    """Raise if weights are NaN or infinite: every picture would be black, and some converters make it a number.

    Raises:
        CheckpointError: names the tensor, how many of its values are affected, and the first.
    """
    bad = found.non_finite
    if bad is not None:
        others = f"; {bad.tensors - 1} more tensors have some too" if bad.tensors > 1 else ""
        raise CheckpointError(
            f"{file}: tensor {bad.tensor!r} holds {bad.count} NaN or infinite values, the first at {bad.index}{others}",
            hint="the checkpoint is broken (a merge or an fp16 cast overflowed): get it from its source again",
        )


def _one_pass(file: Path, tensors: Sequence[StoredTensor]) -> Survey:
    digest = hashlib.sha256()
    largest, largest_tensor, first, affected = 0.0, "", None, 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    # hashlib and numpy both release the interpreter lock: hashing, the slower half, hides the scan.
    content: dict[str, str] = {}
    with FileIO(file) as stream, ThreadPoolExecutor(2) as hashing:
        position = 0
        for tensor in sorted(tensors, key=lambda tensor: tensor.start):
            if tensor.start < position:
                continue  # another name of bytes that were just read
            _hash_between(tensor.start - position, buffer, stream, digest)
            position = tensor.start + tensor.bytes
            scan = _Scan(dtype_of(tensor))
            own = hashlib.sha256()
            for offset in range(0, tensor.bytes, CHUNK_BYTES):
                chunk = _fill(buffer[: min(CHUNK_BYTES, tensor.bytes - offset)], stream)
                hashed = [hashing.submit(each.update, chunk) for each in (digest, own)]
                scan.add(chunk)
                for done in hashed:
                    done.result()
            content[place_of(tensor)] = own.hexdigest()
            if scan.count:
                affected += 1
                first = first or NonFinite(tensor.name, scan.first, scan.count, 0)
            elif scan.abs_max > largest:
                largest, largest_tensor = scan.abs_max, tensor.name
        _hash_between(file.stat().st_size - position, buffer, stream, digest)
    if first is not None:
        first = NonFinite(first.tensor, first.index, first.count, affected)
    return Survey(digest.hexdigest(), largest, largest_tensor, first, content)


def _hash_between(count: int, buffer: memoryview, stream: FileIO, digest: Any) -> None:
    """Read `count` bytes that are no tensor's: a header, or what an archive has between its members."""
    for offset in range(0, count, CHUNK_BYTES):
        digest.update(_fill(buffer[: min(CHUNK_BYTES, count - offset)], stream))


class _Scan:
    """Running maximum and count of non-finite values of one tensor."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._seen = 0  # values
        self.abs_max = 0.0
        self.first = -1
        self.count = 0

    def add(self, chunk: memoryview) -> None:
        if self._dtype.name not in _PATTERNS:
            return  # integers are always finite
        unsigned, without_sign, infinity = _PATTERNS[self._dtype.name]
        magnitudes = np.frombuffer(chunk, unsigned) & unsigned.type(without_sign)
        top = magnitudes.max()
        if top >= infinity:
            bad = np.flatnonzero(magnitudes >= infinity)
            if not self.count:
                self.first = self._seen + int(bad[0])
            self.count += bad.size
        else:
            self.abs_max = max(self.abs_max, float(np.frombuffer(top.tobytes(), self._dtype)[0]))
        self._seen += magnitudes.size


def _fill(view: memoryview, stream: FileIO) -> memoryview:
    """Read `view` full; one call of an unbuffered stream may return less than asked for."""
    filled = 0
    while filled < len(view):
        count = stream.readinto(view[filled:])
        if not count:
            raise CheckpointError(
                f"{stream.name}: shrank while it was read", hint="wait until the file is completely written"
            )
        filled += count
    return view


def _identity(file: Path) -> list[str | int]:
    """What changes when a file's content does, short of forging: HF caches swap symlinks, hence the real path."""
    real = file.resolve()
    state = real.stat()
    return [MEMO_VERSION, str(real), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _recall(entry: Path) -> Survey | None:
    try:
        return TypeAdapter(Survey).validate_json(entry.read_bytes(), strict=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError:
        return None  # cut short by a crash, or hand-edited: survey again and replace it


def _remember(entry: Path, found: Survey) -> None:
    scratch = entry.with_name(f".{entry.name}.{uuid4().hex}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.write_bytes(TypeAdapter(Survey).dump_json(found))
            scratch.replace(entry)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise NoRoom(
            f"{entry.parent}: cannot be written: {error.strerror}", hint="free space, or use another cache folder"
        ) from error
