"""How a child process ends, in words for the user: it crashed, hung, or the system refused it memory, disk or a file.

`death` and `hang` are what the parent says of a child that could not; the rest are a child's own last replies.
"""

from __future__ import annotations

import errno
import signal
import traceback
from pathlib import Path
from typing import Any, Final

from .errors import DiffusetteError, NoRoom, ToolCrashed
from .limits import MEMORY, SECONDS, ran_out_of_memory

FULL_DISK: Final = 2**20  # bytes free below which a failure is a full disk, whatever a tool says of it
MORE_MEMORY: Final = (
    "close other programs, or take a smaller size or precision; "
    f"{MEMORY}=N lets a process take N MiB whether they are free or not"
)
_TAIL: Final = 20  # lines of a dead tool's output that are shown


def hang(why: str, log: Path, what: str) -> DiffusetteError:
    """The error for a child that was stopped because it hangs, with the last lines of its output."""
    return ToolCrashed(
        f"{what.rpartition(':')[2]} was stopped: {why}; its last lines:\n{_last_lines(log)}",
        hint=f"a native tool hangs on this model: report it with these lines; {SECONDS}=N waits longer",
    )


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_TAIL:]
    return "\n".join(f"  | {line}" for line in lines) or "  | (it printed nothing)"


def death(status: int, log: Path, peak_mib: float, what: str) -> DiffusetteError:
    """The error for a child that died without a reply, with the last lines of its output."""
    tail = _last_lines(log)
    name = what.rpartition(":")[2]
    if ran_out_of_memory(tail):
        return NoRoom(
            f"{name} was given no more memory at {peak_mib:.0f} MiB; its last lines:\n{tail}", hint=MORE_MEMORY
        )
    if status == -signal.SIGKILL:
        return NoRoom(
            f"{name} was killed (signal 9) at {peak_mib:.0f} MiB; its last lines:\n{tail}",
            hint="most often the system ran out of memory: `diffusette inspect` forecasts what a conversion needs",
        )
    if status < 0:
        return ToolCrashed(
            f"{name} crashed with {signal.Signals(-status).name} at {peak_mib:.0f} MiB; its last lines:\n{tail}",
            hint="a native tool failed on this model; please report it with these lines",
        )
    return ToolCrashed(f"{name} ended with status {status} and no result; its last lines:\n{tail}")


def refused(error: OSError, into: Path) -> dict[str, Any]:
    """The reply for what the system refused: the user's matter, unless it is a file that the stage itself writes."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(str(error.filename or ""))
    if error.errno in (errno.EACCES, errno.ENOENT) and isinstance(error.filename, str):
        file = Path(error.filename)
        if file.is_absolute() and not file.is_relative_to(into):
            return {
                "error": "ModelError",
                "what": f"{file} cannot be used: {error.strerror}",
                "hint": "check that it exists and that you may read it",
            }
    return {"bug": traceback.format_exc()}


def no_memory(target: str) -> dict[str, Any]:
    return {"error": "NoRoom", "what": f"{target.rpartition(':')[2]} ran out of memory", "hint": MORE_MEMORY}


def disk_full(file: str) -> dict[str, Any]:
    return {
        "error": "NoRoom",
        "what": f"the disk is full: {file or 'while writing to the cache'}",
        "hint": "free some space (`diffusette cache prune`), or set DIFFUSETTE_CACHE to another disk",
    }
