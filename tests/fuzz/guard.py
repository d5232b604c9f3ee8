"""What must hold while a stranger's file is read: it ends soon, stays small, runs nothing, writes nothing elsewhere."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from diffusette.stages.errors import DiffusetteError

SECONDS: Final = 20.0  # by the clock, for a file of a few kilobytes; milliseconds are usual, machines are busy
MEMORY: Final = 2**30  # bytes that reading one such file may take
ALLOWED: Final = {2, 3, 4, 6}  # exit codes of docs/cli.md that a bad file may end with

# Audit events (https://docs.python.org/3/library/audit_events.html) of code that runs because a file says so.
_RUNS: Final = ("pickle.find_class", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork")
_REACHES: Final = ("socket.connect", "socket.bind", "socket.sendto", "urllib.", "http.", "ftplib.")
_CHANGES: Final = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")

_watching: Path | None = None  # the only folder that may be written now; None: nobody watches
_seen: list[str] = []


class Hang(BaseException):
    """Not an `Exception`, so that nothing on the way mistakes it for a bad file."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching is None:
        return
    if event.startswith((*_RUNS, *_REACHES)):
        _seen.append(f"{event} {arguments!r:.200}")
    elif event == "open" and _writes(arguments) and _is_outside(arguments[0]):
        _seen.append(f"open for writing {arguments!r:.200}")
    elif event in _CHANGES and _is_outside(arguments[0]):
        _seen.append(f"{event} {arguments!r:.200}")


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return bool((flags or 0) & (os.O_WRONLY | os.O_RDWR)) or any(letter in (mode or "") for letter in "wax+")


def _is_outside(path: Any) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):  # a descriptor: opened before, and judged then
        return False
    place = Path(os.path.realpath(os.fsdecode(path)))
    compiled = place.parent.name == "__pycache__"  # of a module that is imported for the first time
    return not (compiled or place == Path(os.devnull) or (_watching and place.is_relative_to(_watching)))


sys.addaudithook(_audit)


def answer(call: Callable[[], object], folder: Path) -> DiffusetteError | None:
    """Run `call`, which reads files of `folder`: None if it accepts them, else the error that a user would read.

    Fails when it ends in any other way, hangs, takes much memory, runs code, or writes outside of `folder`.
    """
    with _bounded(), _watched(folder):
        try:
            call()
        except DiffusetteError as error:
            refusal: DiffusetteError | None = error
        else:
            refusal = None
    if refusal is not None:
        assert refusal.exit_code in ALLOWED, repr(refusal)
        assert refusal.what
        assert len(refusal.what) < 20_000, refusal.what[:500]
    return refusal


@contextmanager
def _watched(folder: Path) -> Iterator[None]:
    global _watching
    _seen.clear()
    _watching = Path(os.path.realpath(folder))
    try:
        yield
    finally:
        _watching = None
    assert _seen == []


@contextmanager
def _bounded() -> Iterator[None]:
    """Interrupt after `SECONDS`; refuse memory beyond `MEMORY` more than is taken now."""

    def stop(*_: object) -> None:
        raise Hang(f"no answer after {SECONDS:.0f} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MEMORY, hard))
    try:
        yield
    except Hang as hang:
        pytest.fail(str(hang))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    """What RLIMIT_DATA counts of this process: private writable memory, proc(5)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:")]
    return int(line.split()[1]) * 2**10
