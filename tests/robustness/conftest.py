"""A conversion in a process of its own, as a user starts it; and one that went straight through, to compare with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest


def command(checkpoint: Path | str, output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "diffusette", "convert", str(checkpoint), "-o", str(output), *more]


def environment(cache: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "DIFFUSETTE_CACHE": str(cache), **(more or {})}


def listen_to_ctrl_c() -> None:
    """A test run that was started in the background inherits an ignored SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="session")
def straight(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All targets of the tiny checkpoint, undisturbed, with one thread. Read only."""
    folder = tmp_path_factory.mktemp("straight")
    done = subprocess.run(
        command(tiny_folder, folder / "out"),
        env=environment(folder / "cache", {"OMP_NUM_THREADS": "1"}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "out"
