"""Child processes: every stage runs in one, because native converters crash and memory must be measured.

`run_in_child` starts `python -m diffusette.stages.child_main`, or has a stage that needs torch forked from a process
that has it imported (`warm`); watches the memory of the process tree; and turns a signal, a failure status or our own
errors into the right exception.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from . import errors
from .environment import patient_environment
from .errors import DiffusetteError
from .failures import death, hang
from .limits import Patience
from .warm import Forked, warm_pid, warm_process

if TYPE_CHECKING:
    from .progress import Watch
    from .stage import Stage

_POLL: Final = 0.1  # seconds between looks at memory
_REPLY_BYTES: Final = 2**16
CHILD: Final = f"{__package__}.child_main"


class ChildBug(RuntimeError):
    """An unexpected exception in a child: a bug of ours, shown with the child's traceback."""


def run_in_child(stage: Stage[Any], into: Path, work: Path, watch: Watch) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run `stage.run(into)` in a child process whose working and temporary folder is private and empty.

    Returns:
        The artifact's facts (without `folder` and `digest`), and what was measured: `seconds`; `cpu_seconds`, with the
        programs that the child started; `own_peak_mib`, of the child itself; `stage_peak_mib`, with the programs that
        it started, sampled; `tree_peak_mib`, with this process too.
    """
    from .publish import scratch_folder
    from .strict import adapter

    kind: type = type(stage)
    started = time.monotonic()
    with scratch_folder(work, stage.name) as folder:
        (folder / "cwd").mkdir()
        request = folder / "request.json"
        request.write_bytes(adapter(kind).dump_json(stage))
        (folder / "reply.part").write_bytes(bytes(_REPLY_BYTES))  # room for the last word, even on a full disk
        target = f"{kind.__module__}:{kind.__qualname__}"
        peaks = _supervise(target, folder, into, watch, warm="torch" in stage.tools)
        reply = json.loads((folder / "reply.json").read_bytes())
    if "error" in reply:
        error: type[DiffusetteError] = getattr(errors, reply["error"], DiffusetteError)
        raise error(reply["what"], hint=reply["hint"])
    if "bug" in reply:
        raise ChildBug(reply["bug"])
    measured = {
        **reply["measured"],
        "seconds": round(time.monotonic() - started, 2),
        "tree_peak_mib": round(peaks.together),
        "stage_peak_mib": round(peaks.started),
    }
    return reply["facts"], measured


@dataclass(slots=True)
class _Peaks:
    """Highest resident memory that was seen, MiB."""

    started: float = 0.0  # of a child and the programs that it started
    together: float = 0.0  # of these and of this process


def _supervise(target: str, folder: Path, into: Path, watch: Watch, *, warm: bool) -> _Peaks:
    """Run the child to its end; return the peak memory of its tree."""
    import psutil

    log = folder / "log.txt"
    lifeline, held = os.pipe()
    with log.open("wb") as output:
        process = _start(target, folder, into, lifeline, output.fileno(), warm=warm)
    os.close(lifeline)
    peaks, ours = _Peaks(), psutil.Process()
    try:
        patience = Patience(process.pid)
        while process.poll() is None:
            started = started_rss_mib(ours)
            together = started + ours.memory_info().rss / 2**20
            peaks = _Peaks(max(peaks.started, started), max(peaks.together, together))
            watch(together)
            if why := patience.ended():
                raise hang(why, log, target)
            time.sleep(_POLL)
    except BaseException:
        _kill_group(process)
        raise
    finally:
        os.close(held)
    _kill_group(process)  # what the child may have left running
    status = process.wait()
    if status != 0 or not (folder / "reply.json").is_file():
        raise death(status, log, peaks.together, target)
    return peaks


def _start(
    target: str, folder: Path, into: Path, stdin: int, stdout: int, *, warm: bool
) -> subprocess.Popen[bytes] | Forked:
    environment = patient_environment(folder / "cwd")
    places = {"folder": str(folder), "into": str(into), "cwd": str(folder / "cwd")}
    for _ in range(2 if warm else 0):  # twice: a server that died unnoticed is replaced by the second look
        server = warm_process()
        if server and (
            forked := server.fork({"target": target, "environment": environment, **places}, [stdin, stdout])
        ):
            return forked
    return subprocess.Popen(
        [sys.executable, "-m", CHILD, target, str(folder), str(into)],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        cwd=folder / "cwd",
        env=environment,
        start_new_session=True,
    )


def started_rss_mib(process: Any) -> float:
    """Resident memory of all descendants of a psutil process, MiB.

    Without the warm process: what it holds is shared with the child that is forked from it, and counted there.
    """
    import psutil

    total, idle = 0, warm_pid()
    for member in process.children(recursive=True):
        try:
            if member.pid == idle:
                continue
            total += member.memory_info().rss
        except psutil.Error:
            continue  # it ended between the listing and the look
    return float(total / 2**20)


def _kill_group(process: subprocess.Popen[bytes] | Forked) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()
