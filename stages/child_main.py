"""Child side of a stage: `python -m diffusette.stages.child_main`, or what a warm process forks, runs `main`.

The child dies with its parent: it holds the read end of a pipe whose other end only the parent has.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import errors
from .errors import DiffusetteError
from .failures import FULL_DISK, disk_full, no_memory, refused
from .limits import limit_memory, ran_out_of_memory


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
