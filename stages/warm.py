"""A process that has PyTorch imported already, and forks the children that need it.

Importing torch, diffusers and transformers takes seconds, and a conversion has dozens of stages that need them.
So the first such stage starts this process, which imports them once and then forks a child a stage. A fork
begins where the import ended; it shares no state with other stages, since each is forked from the same, untouched
parent. Linux only: elsewhere a fork after such imports is not safe, and every stage starts a fresh interpreter.
docs/decisions/0004.

The parent side is `WarmProcess`. Server and parent talk over one socket, a JSON line a message: a request; then the
child's pid, sent by the child when it leads its own process group; then its exit status, sent by the server.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from .child_main import main
from .environment import patient_environment

# What export and reference stages import anyway. Nothing native beyond torch: runtimes belong to their own stages.
PRELOADED: Final = ("torch", "numpy", "pydantic", "onnx", "onnx_ir", "onnxscript.optimizer")
_NAMES: Final = {  # both packages load their modules on first use of a name
    "diffusers": ("UNet2DConditionModel", "AutoencoderKL", "StableDiffusionPipeline"),
    "transformers": ("CLIPTextConfig", "CLIPTextModel", "CLIPTokenizer"),
}


class Forked:
    """A child of the warm process, seen from the parent that asked for it: what `subprocess.Popen` is to a program."""

    def __init__(self, server: WarmProcess, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        """The exit status if the child has ended, negative for a signal; else None."""
        if self.returncode is None and self._server.has_news():
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Wait for the end of the child, and return its status. -9 also stands for a server that died with it."""
        if self.returncode is None:
            message = self._server.listen()
            self.returncode = -signal.SIGKILL if message is None else int(message["status"])
            self._server.busy = False
        return self.returncode


class WarmProcess:
    """The server's handle; it dies with this process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=patient_environment(Path(os.devnull)),
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is the parent's matter
        )
        theirs.close()
        self._owner = os.getpid()
        self._socket = ours
        self._reader = ours.makefile("rb")
        self.pid = self._process.pid
        self.busy = False

    @property
    def usable(self) -> bool:
        """Whether the next child can be forked: the server lives, is ours, and has no child now."""
        return self._owner == os.getpid() and not self.busy and self._process.poll() is None

    def fork(self, request: dict[str, Any], files: list[int]) -> Forked | None:
        """Fork a child for `request` (see `_become`) with `files` as its stdin and stdout; None if the server died."""
        self.busy = True
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode() + b"\n"], files)
            message = self.listen()
        except OSError:
            message = None
        if message is None:
            self.stop()
            self.busy = False
            return None
        return Forked(self, int(message["pid"]))

    def has_news(self) -> bool:
        """Whether the server has something to say, or is gone."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def listen(self) -> dict[str, Any] | None:
        """The server's next message; None when it is gone."""
        with suppress(OSError, ValueError):
            line = self._reader.readline()
            return dict(json.loads(line)) if line else None
        return None

    def stop(self) -> None:
        """End the server and, with it, a child that it may have."""
        with suppress(OSError):
            self._socket.close()
        self._process.kill()
        self._process.wait()


_server: WarmProcess | None = None


def warm_process() -> WarmProcess | None:
    """The warm process of this process, started when there is none yet; None where it cannot serve."""
    global _server
    if sys.platform != "linux" or os.environ.get("DIFFUSETTE_COLD"):
        return None
    if _server is None or not (_server.busy or _server.usable):
        _server = WarmProcess()
        atexit.register(_server.stop)
    return _server if _server.usable else None


def warm_pid() -> int | None:
    """Process id of the warm process, if there is one."""
    return _server.pid if _server else None


def serve(control: socket.socket) -> None:
    """Server side: import, then fork a child a request until the parent hangs up."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)
    for module in PRELOADED:
        importlib.import_module(module)
    for module, names in _NAMES.items():
        for name in names:
            getattr(importlib.import_module(module), name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it marks
    while True:
        data, files, _, _ = socket.recv_fds(control, 2**20, 2)
        while data and not data.endswith(b"\n"):
            data += control.recv(2**20)
        if not data:
            return
        request = json.loads(data)
        pid = os.fork()
        if pid == 0:
            _become(request, files, control)
        for file in files:
            os.close(file)
        _attend(pid, control)


def _become(request: dict[str, Any], files: list[int], control: socket.socket) -> None:
    """Child side: take the place that a fresh interpreter would have had, and never return."""
    status = 1
    try:
        os.setsid()
        for source, target in zip((files[0], files[1], files[1]), (0, 1, 2), strict=True):
            os.dup2(source, target)
        for file in files:
            os.close(file)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        tempfile.tempdir = None  # or it would stay what it was in the server
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [path for path in paths if path and path not in sys.path]
        control.sendall(json.dumps({"pid": os.getpid()}).encode() + b"\n")
        control.close()
        gc.unfreeze()
        main(request["target"], Path(request["folder"]), Path(request["into"]))
        status = 0
    except BaseException:  # noqa: BLE001 - the log is read by the parent, and nothing may return into the server
        import traceback

        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _attend(pid: int, control: socket.socket) -> None:
    """Report how the child ended; kill it if the parent goes first."""
    watched = os.pidfd_open(pid)
    try:
        ready, _, _ = select.select([watched, control.fileno()], [], [])
        if watched not in ready:
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        control.sendall(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
    finally:
        os.close(watched)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
