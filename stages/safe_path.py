"""Paths that a stranger wrote: only those that stay below a folder, read the same on every system."""

from __future__ import annotations

import re
from typing import Final

from pydantic_core import PydanticCustomError

# Windows reads a colon as a drive or a stream, and does not see trailing dots and spaces or know these names.
_FORBIDDEN: Final = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\]')
_DEVICES: Final = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def inside(path: str) -> str:
    """Return `path` if, on every system, it names something below the folder it is joined to.

    Raises:
        PydanticCustomError: it is absolute, climbs, or is written in a way that some system reads otherwise.
    """
    parts = path.split("/")
    if _FORBIDDEN.search(path) or any(part in ("", ".", "..") or part[-1] in ". " for part in parts):
        raise PydanticCustomError("path", "must be a plain relative path below the bundle, with forward slashes")
    if any(_DEVICES.fullmatch(part) for part in parts):
        raise PydanticCustomError("path", "is the name of a device on Windows")
    if len(path.encode(errors="surrogatepass")) > 1024 or not path.isprintable():
        raise PydanticCustomError("path", "must be printable and at most 1024 bytes long")
    return path
