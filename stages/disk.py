"""What a disk refuses, said in words: full, read-only, not permitted; and copies that are no hard links."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from .errors import DiffusetteError, ModelError, NoRoom, UsageError

_FULL: Final = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN: Final = {errno.EACCES, errno.EPERM, errno.EROFS}
# EFBIG: a file of 4 GB on FAT32.
_NOT_A_PLACE: Final = {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG}
# What copy_file_range answers where a file system or kernel cannot do it; the bytes are then copied by hand.
_NO_KERNEL_COPY: Final = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}
_CHUNK: Final = 8 * 2**20
_BYTES: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", re.IGNORECASE)
_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def mebibytes(count: int) -> str:
    """`count` bytes for people: `1,234.5 MiB`."""
    return f"{count / 2**20:,.1f} MiB"


def parse_bytes(text: str, what: str = "") -> int:
    """`20GB` -> 20000000000; a bare number counts bytes.

    Args:
        what: names the option in the error, if it has one.
    Raises:
        UsageError: another form.
    """
    match = _BYTES.fullmatch(text.strip())
    if not match:
        raise UsageError(f"{what} {text!r} is not a size".lstrip(), hint="for example 20GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def free_bytes(place: Path) -> int:
    """Bytes that an ordinary user may still write on the disk of `place`, which need not exist yet."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def require_room(place: Path, needed: int) -> None:
    """Raise `NoRoom` with both figures when `needed` bytes clearly do not fit on the disk of `place`."""
    free = free_bytes(place)
    if needed > free:
        raise _no_room(place, f"{mebibytes(needed)} needed", free)


@contextmanager
def explained(place: Path, *, needed: int = 0) -> Iterator[None]:
    """Turn the block's failures to write `place` into errors that say what to do; others pass unchanged.

    Args:
        place: what is being written; also the folder below which a refusal is `place`'s own.
        needed: bytes that the block writes in all, 0 when nobody knows.
    Raises:
        NoRoom: the disk is full, also where a library wrapped the system's error in one of its own.
        UsageError: the place may not be written, or cannot exist.
    """
    try:
        yield
    except DiffusetteError:
        raise
    except Exception as error:
        if _is_full(error):
            why = f"{mebibytes(needed)} needed" if needed else "it filled while writing"
            raise _no_room(place, why, free_bytes(place)) from error
        if isinstance(error, OSError) and _concerns(error, place):
            if error.errno in _FORBIDDEN:
                hint = "choose another place, or give yourself the right to write there"
                raise UsageError(f"{_named(error, place)}: cannot be written: {error.strerror}", hint=hint) from error
            if error.errno in _NOT_A_PLACE or _is_file_above(error, place):
                reason = os.strerror(errno.ENOTDIR) if error.errno == errno.EEXIST else error.strerror
                what = f"{_named(error, place)}: cannot be written: {reason}"
                raise UsageError(what, hint="choose another place") from error
        raise


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of `source` to a new file `target`: as a reflink where the file system can, never as a hard link.

    A hard link would let an app developer who edits a bundle damage the cache it came from. Permission bits
    are not copied: cache files may be read-only, a user's are not.

    Raises:
        ModelError: `source` cannot be read, or changes while it is read.
        NoRoom, UsageError: `target` cannot be written.
    """
    try:
        reading = source.open("rb")
    except OSError as error:
        hint = "check that it exists and that you may read it"
        raise ModelError(f"{source}: cannot be read: {error.strerror}", hint=hint) from error
    with reading:
        size = os.fstat(reading.fileno()).st_size
        with explained(target, needed=size), target.open("xb") as writing:
            try:
                if not _copied_by_kernel(reading.fileno(), writing.fileno(), size):
                    shutil.copyfileobj(reading, writing, _CHUNK)
                    writing.flush()
                copied = os.fstat(writing.fileno()).st_size
                if copied != size:
                    hint = "nothing may write it meanwhile; try again"
                    raise ModelError(f"{source}: {size} bytes long, but {copied} could be copied", hint=hint)
            except BaseException:
                target.unlink()
                raise


def flush(path: Path) -> None:
    """Force a file, or a folder and all in it, to the disk: a rename that follows must not outlive the bytes."""
    if path.is_dir():
        for folder, _, files in os.walk(path):
            for file in files:
                fsync(Path(folder, file))
            fsync(Path(folder))
    else:
        fsync(path)


def fsync(path: Path) -> None:
    """Force one file or the entries of one folder to the disk: a rename is durable only then (fsync(2), notes)."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copied_by_kernel(source: int, target: int, size: int) -> bool:
    """Copy with copy_file_range, which reflinks on btrfs and XFS. False when it cannot, with nothing written."""
    if not hasattr(os, "copy_file_range"):
        return False
    done = 0
    while done < size:
        try:
            step = os.copy_file_range(source, target, size - done)
        except OSError as error:
            if done == 0 and error.errno in _NO_KERNEL_COPY:
                return False
            raise
        if step == 0:  # the source is shorter than it was; the caller compares the sizes
            break
        done += step
    return done > 0 or size == 0


def _is_full(error: BaseException) -> bool:
    """True for "disk full" itself, and for a library's own exception about it (safetensors, onnx, torch)."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    words = os.strerror(errno.ENOSPC).lower()
    return any((isinstance(e, OSError) and e.errno in _FULL) or words in str(e).lower() for e in chain)


def _concerns(error: OSError, place: Path) -> bool:
    """True when `error` names `place`, a folder above it, or something below it or below its dot-named scratch."""
    if error.filename is None:
        return True
    at, place = Path(os.path.realpath(os.fsdecode(error.filename))), Path(os.path.realpath(place))
    if at in place.parents:
        return True
    below = at.relative_to(place.parent).parts if at.is_relative_to(place.parent) else ()
    return bool(below) and (below[0] == place.name or below[0].startswith(f".{place.name}."))


def _is_file_above(error: OSError, place: Path) -> bool:
    """True when a folder above `place` was to be made and is a file; mkdir calls that "File exists"."""
    return error.errno == errno.EEXIST and Path(os.path.realpath(error.filename)) in place.parents


def _named(error: OSError, place: Path) -> str:
    """`place`, and the folder above it if that one is to blame."""
    if error.filename is not None and Path(at := os.path.realpath(os.fsdecode(error.filename))) in place.parents:
        return f"{place} (at {at})"
    return str(place)


def _no_room(place: Path, why: str, free: int) -> NoRoom:
    hint = "free some space, or choose another disk"
    return NoRoom(f"{place}: the disk is full: {why}, {mebibytes(free)} free", hint=hint)
