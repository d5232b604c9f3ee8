"""Run a command that cannot open a socket but a local one: `python offline.py COMMAND...`.

A seccomp filter (seccomp(2), Documentation/userspace-api/seccomp_filter.rst of Linux) holds for the command and all
that it starts, native programs too: the kernel ends a process that asks for a socket of another family than AF_UNIX.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from typing import Final

_SOCKET: Final = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}  # AUDIT_ARCH_*, __NR_socket
_KILL, _ALLOW = 0x80000000, 0x7FFF0000  # SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_ALLOW
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_NUMBER, _ARCHITECTURE, _ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data: nr, arch, args[0]
_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2  # prctl(2)


def available() -> bool:
    return sys.platform == "linux" and platform.machine() in _SOCKET


def forbid_sockets() -> None:
    """Install the filter in this process."""
    architecture, number = _SOCKET[platform.machine()]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 0, 5, architecture),  # another calling convention: die
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 0, 2, number),  # no socket: go on
        (_LOAD, 0, 0, _ARGUMENT),
        (_EQUAL, 0, 1, 1),  # AF_UNIX
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _KILL),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
    head = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_NO_NEW_PRIVS, 1, 0, 0, 0), (_SET_SECCOMP, _FILTER, ctypes.addressof(head), 0, 0)):
        if libc.prctl(*(ctypes.c_ulong(argument) for argument in arguments)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    forbid_sockets()
    os.execvp(sys.argv[1], sys.argv[1:])
