"""Every Python process of a watched conversion imports this first: it writes down which programs are started."""

from __future__ import annotations

import os
import sys

_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")


def _note(text: str) -> None:
    log = os.open(os.environ["DIFFUSETTE_TEST_STARTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(log, text.replace("\n", " ").encode() + b"\n")
    os.close(log)


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if event == "subprocess.Popen":
        _note(" ".join(map(os.fsdecode, arguments[1])))  # type: ignore[call-overload]
    elif event in _STARTS:
        _note(f"{event} {arguments[:2]!r}")


if "DIFFUSETTE_TEST_STARTS" in os.environ:
    import socket

    # urllib3 asks, on import, whether a socket can be bound to ::1; nothing is sent. Everything else is still watched.
    socket.has_ipv6 = False
    _note(" ".join(sys.orig_argv))
    sys.addaudithook(_watch)
