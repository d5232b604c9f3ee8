"""All or nothing on disk: what is written becomes visible by one rename, or not at all.

A killed process leaves dot-names behind that say whose they were, `.unet.3f2a91c0-4711-1763846400-9d1e77aa.scratch`:
the machine (or container), the process, when that process began (a process id is reused, a pair of id and start is
not), and chance. `sweep` reads them, so nothing that a dead process left stays for ever, and nothing of a living one
is touched.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal
from uuid import uuid4

import psutil

from .disk import explained, flush, fsync, require_room
from .errors import UsageError

Existing = Literal["keep", "refuse", "replace"]

_LEFTOVER: Final = re.compile(
    r"\.(?P<name>.+)\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<began>\d+)-[0-9a-f]{8}\.(?P<role>scratch|aside)"
)
# Start times are computed from the boot time, which moves by a second or so when the clock is set.
_CLOCK_SLACK: Final = 3.0
# A folder shared by machines (or containers) holds names whose processes cannot be seen from here.
_FOREIGN_AGE: Final = 7 * 24 * 3600.0


@contextmanager
def published(folder: Path, *, existing: Existing = "keep", needed: int = 0) -> Iterator[Path]:
    """Yield a scratch folder that becomes `folder` if, and only if, the block succeeds.

    Args:
        folder: where the result appears; parents are made. An empty folder counts as absent.
        existing: when `folder` is there already (or another process wins the race to it): `keep` it and drop the
            new one (content-addressed stores: both are equal), `refuse` to begin, or `replace` it. Replacing
            moves the old one aside, the new one in, and then deletes the old one. Whatever happens in between,
            one of them can be found, and `sweep` puts the old one back if the process died between the two.
        needed: bytes that will be written, 0 when unknown; compared with the free space before anything starts.
    Raises:
        NoRoom: the disk cannot hold it, before or during the block.
        UsageError: `folder` exists and is refused, is a file, or may not be written.
    """
    folder = Path(os.path.realpath(folder))
    if existing == "refuse" and _occupied(folder):
        raise _exists(folder)
    with explained(folder, needed=needed):
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent)
        require_room(folder, needed)
        scratch = _beside(folder, "scratch")
        scratch.mkdir()
    try:
        with explained(folder, needed=needed):  # before the scratch is removed: it tells how full the disk was
            yield scratch
            flush(scratch)
            _install(scratch, folder, existing)
            fsync(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # what stays is swept later; the block's own error matters more


@contextmanager
def written(file: Path, *, needed: int = 0) -> Iterator[Path]:
    """Yield a scratch path beside `file`; what the block writes there replaces `file` if, and only if, it succeeds.

    Raises:
        NoRoom, UsageError: as `published`.
    """
    file = Path(os.path.realpath(file))
    with explained(file, needed=needed):
        file.parent.mkdir(parents=True, exist_ok=True)
        require_room(file, needed)
    scratch = _beside(file, "scratch")
    try:
        with explained(file, needed=needed):
            yield scratch
            flush(scratch)
            scratch.replace(file)
            fsync(file.parent)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a private folder below `parent` that is removed at the end, or by `sweep` if this process is killed."""
    folder = _beside(parent / name, "scratch")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> tuple[str, ...]:
    """Remove from `parent` what dead processes left, and put back what one moved aside without a replacement.

    Returns:
        The names that were dealt with, sorted. Names of living processes, and those of other machines that are
        younger than a week, are left alone.
    """
    dealt_with = []
    for entry in sorted(parent.iterdir()):
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or _in_use(entry, match):
            continue
        original = parent / match["name"]
        if match["role"] == "aside" and not _occupied(original):
            entry.replace(original)
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)  # two sweepers may meet here
        else:
            entry.unlink(missing_ok=True)
        dealt_with.append(entry.name)
    return tuple(dealt_with)


def _install(scratch: Path, folder: Path, existing: Existing) -> None:
    if existing == "replace" and _occupied(folder):
        _swap(scratch, folder)
        return
    try:
        scratch.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or existing == "replace":
            raise
        if existing == "refuse":  # it appeared while the block ran
            raise _exists(folder) from error


def _swap(scratch: Path, folder: Path) -> None:
    aside = _beside(folder, "aside")
    folder.rename(aside)
    try:
        scratch.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    fsync(folder.parent)
    rubbish = _beside(folder, "scratch")  # a half-deleted folder must not be one that `sweep` would put back
    aside.rename(rubbish)
    if rubbish.is_dir():
        shutil.rmtree(rubbish, ignore_errors=True)
    else:
        rubbish.unlink()


def _occupied(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _exists(folder: Path) -> UsageError:
    return UsageError(f"{folder}: exists already", hint="choose another name with -o, or remove it first")


def _beside(path: Path, role: Literal["scratch", "aside"]) -> Path:
    began = int(psutil.Process().create_time())
    return path.with_name(f".{path.name}.{_machine()}-{os.getpid()}-{began}-{uuid4().hex[:8]}.{role}")


def _machine() -> str:
    """Who else can see our process ids: containers may share a host name, but not the namespace of their processes."""
    namespace = Path("/proc/self/ns/pid")  # pid_namespaces(7), on Linux
    inside = namespace.readlink() if namespace.is_symlink() else ""
    return hashlib.sha256(f"{platform.node()} {inside}".encode()).hexdigest()[:8]


def _in_use(entry: Path, match: re.Match[str]) -> bool:
    """True unless the process that made `entry` is certainly gone."""
    try:
        if match["machine"] != _machine():
            return time.time() - entry.lstat().st_mtime < _FOREIGN_AGE
        owner = psutil.Process(int(match["pid"]))
        # A process that began later than the name says only has the same id.
        return bool(owner.status() != psutil.STATUS_ZOMBIE and owner.create_time() - int(match["began"]) < _CLOCK_SLACK)
    except FileNotFoundError:  # swept by somebody else meanwhile
        return True
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
