"""What a child process may take of this machine: memory that it writes, and time. docs/decisions/0004.

Native tools hang and allocate without end, on files that are damaged and on some that are not. The child limits its
own memory, so that it fails with a word instead of letting the system kill something; the parent watches the clock.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Final

from .errors import UsageError

MIB: Final = 2**20
MEMORY: Final = "DIFFUSETTE_CHILD_MIB"
SECONDS: Final = "DIFFUSETTE_CHILD_SECONDS"

_LEAST_MIB: Final = 2048.0  # what a child gets where less is free: the system then decides
_SECONDS: Final = 6 * 3600.0  # of one stage, or one run of a model; the longest seen took 20 minutes
_IDLE: Final = 600.0  # seconds without any work of the processor: a deadlock
_LOOK: Final = 5.0  # seconds between looks at the processor time

# How native code says that it was given no memory: C++, the system, PyTorch's and ONNX Runtime's allocators, ncnn.
_NO_MEMORY: Final = re.compile(
    r"bad_alloc|cannot allocate memory|not enough memory|out of memory|failed to allocate", re.IGNORECASE
)


def memory_available_mib(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """What this process may still take: the system's available memory, or less where a cgroup limits it."""
    import psutil

    available = float(psutil.virtual_memory().available)
    limit = cgroup / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        lines = (cgroup / "memory.stat").read_text().splitlines()
        stat = {name: float(count) for name, count in (line.split() for line in lines)}
        used = float((cgroup / "memory.current").read_text())
        used -= stat["inactive_file"] + stat["active_file"]  # the page cache, which gives way to who needs memory
        available = min(available, float(text) - used)
    return available / MIB


def limit_memory() -> None:
    """Let this process and all that it starts write to no more memory than the machine has now, swap included.

    RLIMIT_DATA counts private writable memory, on Linux mapped memory too (setrlimit(2)). Not RLIMIT_AS: weights that
    are mapped for reading, and address space that allocators reserve, take no memory.
    """
    chosen = _chosen(MEMORY)
    if sys.platform != "linux":
        return  # elsewhere RLIMIT_DATA does not see what malloc takes
    import resource

    import psutil

    mib = chosen or max(_LEAST_MIB, memory_available_mib() + psutil.swap_memory().free / MIB)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int(mib * MIB)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def ran_out_of_memory(words: str) -> bool:
    """Whether the last words of native code, or its exception's, mean that it was given no memory."""
    return bool(_NO_MEMORY.search(words))


class Patience:
    """How long a parent waits for the process `pid` and all that it started.

    Raises:
        UsageError: the environment sets a limit that is no number.
    """

    def __init__(self, pid: int) -> None:
        _chosen(MEMORY)  # the child could only die of it
        self._pid = pid
        self._seconds = _chosen(SECONDS) or _SECONDS
        self._started = self._worked = self._looked = time.monotonic()
        self._used = 0.0

    def ended(self) -> str:
        """Why there is no more waiting, or an empty string. Cheap enough for ten calls a second."""
        now = time.monotonic()
        if now - self._started > self._seconds:
            return f"it was not done after {self._seconds:.0f} s"
        if now - self._looked < min(_LOOK, self._seconds):
            return ""
        self._looked = now
        used = _processor_seconds(self._pid)
        if used != self._used:
            self._used, self._worked = used, now
        idle = now - self._worked
        return f"it has done nothing for {idle:.0f} s" if idle > min(_IDLE, self._seconds) else ""


def _processor_seconds(pid: int) -> float:
    """Processor time of a process and its living descendants."""
    import psutil

    try:
        members = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return -1.0
    total = 0.0
    for member in members:
        try:
            times = member.cpu_times()
        except psutil.Error:
            continue  # it ended between the listing and the look
        total += times.user + times.system
    return total


def _chosen(name: str) -> float | None:
    """A positive number from the environment, None where there is none.

    Raises:
        UsageError: it is something else.
    """
    text = os.environ.get(name, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f"{name} is {text!r}", hint="a whole number above 0 is needed; unset it for the default")
    return float(text)
