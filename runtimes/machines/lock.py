"""What an emulated machine is made of: every file by name, version and sha256, as `lock.json` states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FILE: Final = Path(__file__).with_name("lock.json")


@dataclass(frozen=True, slots=True)
class Pinned:
    """One file: a Debian package or a wheel."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Lock:
    """`userland`: Debian packages for arm64; `emulator`: one for this computer; `wheels`: Python packages."""

    userland_suites: tuple[str, ...]
    userland: tuple[Pinned, ...]
    emulator_suite: str
    emulator: Mapping[str, Pinned]  # by this computer's Debian architecture
    wheels: tuple[Pinned, ...]
    digest: str


def read_lock(file: Path = FILE) -> Lock:
    """The lock that is shipped."""
    content = file.read_bytes()
    stated: dict[str, Any] = json.loads(content)
    return Lock(
        tuple(stated["userland"]["suites"]),
        _pinned(stated["userland"]["packages"]),
        stated["emulator"]["suite"],
        {architecture: _pinned(entry)[0] for architecture, entry in stated["emulator"]["packages"].items()},
        _pinned(stated["wheels"]),
        hashlib.sha256(content).hexdigest(),
    )


def _pinned(entries: Mapping[str, Mapping[str, str]]) -> tuple[Pinned, ...]:
    return tuple(Pinned(name, entry["version"], entry["sha256"]) for name, entry in entries.items())
