"""A session in a child process: native code that crashes, hangs or eats memory does so where it can be watched."""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..stages import errors
from ..stages.artifacts import TensorSpec
from ..stages.child import ChildBug
from ..stages.child_main import die_with_parent, own_peak_mib
from ..stages.environment import child_environment, patient_environment
from ..stages.errors import DiffusetteError, ToolCrashed
from ..stages.failures import MORE_MEMORY, death, hang
from ..stages.limits import Patience, limit_memory, ran_out_of_memory
from .checks import checked_feeds, checked_results
from .machines.machine import HERE, Machine
from .protocol import Array, Closing, Feeds, Session

_PAUSE = 1.0  # seconds between looks at a child that does not answer


class IsolatedSession(Closing):
    """The parent's handle of a session that lives in a child process. Satisfies `Session`."""

    def __init__(
        self, opener: str, argument: object, threads: int, name: str, timed: bool, machine: Machine = HERE
    ) -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="diffusette-session-")
        self._log = Path(self._folder.name) / "log.txt"
        ours, theirs = socket.socketpair()
        argv = [*machine.python, "-m", __name__, opener, str(threads), str(theirs.fileno())]
        environment = (child_environment if timed else patient_environment)(Path(self._folder.name))
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,  # never written: its end tells the child that we are gone
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._folder.name,
                env=machine.environment_of(environment),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()
        self._pipe = Connection(ours.detach())
        self.peak_rss_mib = 0.0
        self.last_seconds = 0.0
        self.last_waited = 0.0
        try:
            reply = self._ask(_plain(argument))
        except BaseException:
            self.close()
            raise
        self.inputs = tuple(TensorSpec(*spec) for spec in reply["inputs"])
        self.outputs = tuple(TensorSpec(*spec) for spec in reply["outputs"])
        self.load_seconds: float = reply["seconds"]

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run once in the child; `last_seconds` is then the native time, without the way there and back.

        `last_waited`: seconds that the child's threads, together, waited for a processor meanwhile.
        """
        checked = checked_feeds(feeds, self.inputs, self.name)
        reply = self._ask(checked)
        self.last_seconds, self.last_waited = reply["seconds"], reply["waited"]
        return checked_results(reply["results"], self.outputs, self.name)

    def _ask(self, message: object) -> dict[str, Any]:
        try:
            self._pipe.send(message)
            patience = Patience(self._process.pid)
            while not self._pipe.poll(_PAUSE):  # ends at once with an answer, or the child's end
                if why := patience.ended():
                    self._kill()
                    raise hang(why, self._log, self.name)
            reply: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            raise self._death(status) from None
        if "error" in reply:
            raise getattr(errors, reply["error"], DiffusetteError)(reply["what"], hint=reply["hint"])
        if "bug" in reply:
            raise ChildBug(reply["bug"])
        self.peak_rss_mib = reply["peak_rss_mib"]
        return reply

    def _death(self, status: int) -> DiffusetteError:
        if status == 0:
            return ToolCrashed(f"{self.name}: the runtime's process ended by itself")
        return death(status, self._log, self.peak_rss_mib, self.name)

    def close(self) -> None:
        """End the child and free all that it held. Safe to call twice."""
        self._pipe.close()
        self._kill()
        if self._process.stdin:
            self._process.stdin.close()
        self._folder.cleanup()

    def _kill(self) -> None:
        if self._process.poll() is None:
            with suppress(ProcessLookupError):  # it ended in this very moment
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def open_isolated(
    opener: str, argument: object, *, threads: int, name: str = "", timed: bool = False, machine: Machine = HERE
) -> IsolatedSession:
    """Load a model in a child process.

    Args:
        opener: "package.module:function", called in the child as function(argument, threads) -> Session.
        argument: plain values or a dataclass of them, e.g. a `TargetModel`.
        name: how errors call the model.
        timed: let its threads wait as the runtime has them wait, and not as it suits other work on this machine.
        machine: where the child runs.
    Raises:
        ToolCrashed, NoRoom: the child died while loading.
    """
    component = getattr(argument, "component", "")
    target = getattr(argument, "target", opener.partition(":")[0].rpartition(".")[2])
    return IsolatedSession(opener, argument, threads, name or f"{target} {component}".strip(), timed, machine)


def _plain(argument: object) -> object:
    """A dataclass as a dictionary, so that the child validates what it gets."""
    if dataclasses.is_dataclass(argument) and not isinstance(argument, type):
        return dataclasses.asdict(argument)
    return argument


def _serve(opener: str, threads: int, pipe: Connection) -> None:
    """Child side: open the model, then answer one run after the other until the parent hangs up."""
    module, _, function = opener.partition(":")
    session: Session | None = None
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        waited, started = _waited(), time.perf_counter()
        reply: dict[str, Any]
        try:
            if session is None:
                session = getattr(importlib.import_module(module), function)(message, threads)
                specs = {"inputs": session.inputs, "outputs": session.outputs}
                reply = {key: [(s.name, s.dtype, s.shape) for s in value] for key, value in specs.items()}
            else:
                reply = {"results": session.run(message)}
            reply["seconds"] = time.perf_counter() - started
            reply["waited"] = _waited() - waited
        except DiffusetteError as error:
            reply = {"error": type(error).__name__, "what": error.what, "hint": error.hint}
        except MemoryError as error:
            reply = _no_memory(error, session)
        except Exception as error:  # noqa: BLE001 - the parent raises it as `ChildBug`
            import traceback

            out = ran_out_of_memory(str(error))
            reply = _no_memory(error, session) if out else {"bug": traceback.format_exc()}
        reply["peak_rss_mib"] = own_peak_mib()
        pipe.send(reply)


def _waited() -> float:
    """Seconds that threads of this process were ready to run and had no processor; 0.0 where the system does not tell.

    Linux: the second number of /proc/PID/task/TID/schedstat, in nanoseconds (Documentation/scheduler/sched-stats.rst).
    """
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, IndexError, ValueError):  # a thread that ended in this moment
            total += int(file.read_text().split()[1])
    return total / 1e9


def _no_memory(error: Exception, session: Session | None) -> dict[str, Any]:
    work = "loading" if session is None else "running"
    what = f"{work} the model ran out of memory" + (f": {error}" if str(error) else "")
    return {"error": "NoRoom", "what": what, "hint": MORE_MEMORY}


if __name__ == "__main__":
    die_with_parent()
    limit_memory()
    _serve(sys.argv[1], int(sys.argv[2]), Connection(int(sys.argv[3])))
