"""MNN's converter, called as the native function that it is, in a process of its own.

MNN also ships console programs (`mnnconvert`, `mnn`, `mnnquant`) around this function. They install a package with the
first `pip` on PATH and report each conversion over the network, so nothing here runs them or imports `MNN.tools`;
the child refuses to start a program or open a socket from Python, and has no PATH to find a program with.
docs/decisions/0012.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ...stages.child_main import die_with_parent
from ...stages.environment import child_environment
from ...stages.errors import ToolCrashed
from ...stages.failures import death

_DONE: Final = "Converted Success!"
_TROUBLE: Final = re.compile(r"error|fail|not support|unsupport|can't|cannot|not exist|invalid", re.IGNORECASE)
_SHOWN: Final = 10  # lines of trouble in an error

# Audit events, https://docs.python.org/3/library/audit_events.html
_FORBIDDEN: Final = (
    "ctypes.", "ftplib.", "http.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.system",
    "pty.", "smtplib.", "socket.", "subprocess.", "urllib.",
)  # fmt: skip
_REFUSED: Final = 86  # exit status of a child that tried


def mnnconvert(arguments: Sequence[str], scratch: Path, *, search_path: str = os.devnull) -> str:
    """Run MNN's converter on `arguments` and return what it printed.

    The converter spills weights to a file of a fixed name in its working directory, where a second conversion
    would overwrite them with another model's, and says success all the same. So its directory is made here, below
    `scratch`, and must not exist before.

    Args:
        arguments: as for the program of that name, without the name; paths must be absolute.
        search_path: PATH of the child; by default a place where nothing is found.
    Raises:
        ToolCrashed: it died, printed a line that tells of trouble, or did not claim success. That it claims success
            proves nothing: it does so after writing to a folder that does not exist. Look at the file.
    """
    folder = scratch / "mnnconvert"
    folder.mkdir()
    log = scratch / "mnnconvert.log"
    environment = child_environment(folder) | {"PATH": search_path}
    command = [sys.executable, "-m", __name__, *arguments]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=environment
        ) as process,
    ):
        status = process.wait()  # before its stdin closes: to the child that means that its parent is gone
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    text = log.read_text(errors="replace")
    if status == _REFUSED:
        raise ToolCrashed(
            f"mnnconvert was stopped: {text.splitlines()[-1]}",
            hint="converting needs neither programs nor the network; please report this with your MNN version",
        )
    if status != 0:
        raise death(status, log, peak, "mnnconvert")
    trouble = [line for line in text.splitlines() if _TROUBLE.search(line)]
    if trouble or _DONE not in text:
        lines = "\n".join(f"  | {line}" for line in trouble[:_SHOWN] or text.splitlines()[-_SHOWN:])
        raise ToolCrashed(f"mnnconvert did not convert the model; it said:\n{lines}")
    return text


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event.startswith(_FORBIDDEN) or (event == "import" and str(arguments[0]).startswith("MNN.tools")):
        os.write(2, f"\n{event} {arguments[:2]!r}\n".encode())
        os._exit(_REFUSED)  # an exception could be caught by the code that we do not trust


def _child(arguments: Sequence[str]) -> int:
    die_with_parent()
    sys.addaudithook(_refuse)
    import _tools  # MNN's converter library; its own, unlucky, top-level name

    return 0 if _tools.mnnconvert(["mnnconvert", *arguments]) is True else 1


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1:]))
