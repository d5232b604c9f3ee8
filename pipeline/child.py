"""Child processes: every stage runs in one, because native converters crash and memory must be measured.

Parent side: `run_in_child` starts `python -m diffusette.pipeline.child`, or has a stage that needs torch forked from
a process that has it imported (`warm`); watches the memory of the process tree; and turns a signal, a failure status or
our own errors into the right exception. Child side: `main`. The child dies with its parent: it holds the read end of a
pipe whose other end only the parent has.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from . import errors
from .errors import DiffusetteError
from .last_words import FULL_DISK, death, disk_full, hang, no_memory, refused
from .limits import Patience, limit_memory, ran_out_of_memory
from .warm import Forked, warm_pid, warm_process

if TYPE_CHECKING:
    from .progress import Watch
    from .stage import Stage

_POLL: Final = 0.1  # seconds between looks at memory
_REPLY_BYTES: Final = 2**16
# A stage's threads sleep while they wait: by default they spin, which on a machine that is busy with other work
# takes the very cores that the threads they wait for would need.
_PATIENT: Final = {"OMP_WAIT_POLICY": "PASSIVE"}
_OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


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

    kind = type(stage)
    started = time.monotonic()
    with scratch_folder(work, stage.name) as folder:
        (folder / "cwd").mkdir()
        request = folder / "request.json"
        request.write_bytes(adapter(kind).dump_json(stage))
        (folder / "reply.part").write_bytes(bytes(_REPLY_BYTES))  # room for the last word, even on a full disk
        target = f"{kind.__module__}:{kind.__qualname__}"
        peaks = _supervise(target, folder, into, watch, warm="torch" in kind.tools)
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


def patient_environment(temporary: Path) -> dict[str, str]:
    """`child_environment` for work that is not timed."""
    return {**_PATIENT, **child_environment(temporary)}


def child_environment(temporary: Path) -> dict[str, str]:
    """This process's environment, offline, with temporary files in `temporary`."""
    return {**os.environ, **_OFFLINE, "TMPDIR": str(temporary), "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}


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
        [sys.executable, "-m", __name__, target, str(folder), str(into)],
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


def own_peak_mib() -> float:
    """Highest resident memory of this process so far, MiB.

    Not ru_maxrss where /proc can be asked: on Linux that survives exec, so a child of a large process would report
    its parent's peak as its own.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 2**10  # "VmHWM:  1234 kB", proc(5)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # getrusage(2): bytes on macOS, KiB elsewhere


def _cpu_seconds() -> float:
    """Processor time of this process and of its programs that ended; other work on the machine hardly changes it."""
    programs = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + programs.ru_utime + programs.ru_stime


def die_with_parent() -> None:
    """End this process and all it started as soon as the parent is gone, however it went."""
    if sys.platform == "linux":  # at once, even while native code holds the interpreter lock
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)

    def wait() -> None:
        os.read(0, 1)  # blocks until the parent's end of the pipe closes
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main(target: str, folder: Path, into: Path) -> None:
    """Child side: read the stage, run it, write `reply.json` as the last thing."""
    die_with_parent()
    limit_memory()
    reply: Mapping[str, Any]
    try:
        facts = _run(target, folder, into)
        reply = {
            "facts": facts,
            "measured": {"own_peak_mib": round(own_peak_mib()), "cpu_seconds": round(_cpu_seconds(), 1)},
        }
    except DiffusetteError as error:
        # a target of another package may have errors of its own: the parent knows what they derive from
        known = next(kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
        reply = {"error": known, "what": error.what, "hint": error.hint}
    except OSError as error:
        reply = refused(error, into)
    except MemoryError:
        reply = no_memory(target)
    except Exception as error:  # noqa: BLE001 - the parent raises it as `ChildBug`
        reply = no_memory(target) if ran_out_of_memory(str(error)) else {"bug": traceback.format_exc()}
    if "facts" not in reply and shutil.disk_usage(folder).free < FULL_DISK:
        reply = disk_full("")  # whatever a tool made of it
    with (folder / "reply.part").open("r+b") as part:
        part.write(json.dumps(reply).encode())
        part.truncate()
    (folder / "reply.part").rename(folder / "reply.json")


def _run(target: str, folder: Path, into: Path) -> dict[str, Any]:
    from .strict import adapter

    module, _, name = target.partition(":")
    kind = getattr(importlib.import_module(module), name)
    stage = adapter(kind).validate_json((folder / "request.json").read_bytes())
    artifact = stage.run(into)
    facts: dict[str, Any] = adapter(kind.output).dump_python(artifact, mode="json")
    return {key: value for key, value in facts.items() if key not in ("folder", "digest")}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
