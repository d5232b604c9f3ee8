"""Nothing leaves this machine, and nothing depends on which machine it is: proven by taking the network away."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from .conftest import command, environment, tree
from .offline import available

HERE: Final = Path(__file__).parent
CANARIES: Final = ("pip", "pip3", "uv", "conda", "curl", "wget", "git", "nc", "ssh")
NAMESPACE: Final = ("unshare", "--map-root-user", "--net")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="the filter on sockets is written for Linux on x86-64 and arm64"),
]


def alone() -> tuple[str, ...]:
    """The words that run a command without network interfaces, by whatever this system permits."""
    if not shutil.which("unshare") or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("this system gives no network namespace to an ordinary process (unshare --net)")
    return (*NAMESPACE, sys.executable, "-P", str(HERE / "offline.py"))


def canary(folder: Path) -> str:
    """PATH with programs first that would install or fetch, each of which only says that it was started."""
    folder.mkdir()
    for name in CANARIES:
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "$DIFFUSETTE_TEST_STARTS"\n')
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def run_alone(
    words: list[str], cache: Path, folder: Path, threads: int
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run without network; return the result and every program that was started on the way."""
    starts = folder / "starts"
    starts.touch()
    watched = {
        "DIFFUSETTE_TEST_STARTS": str(starts),
        "PYTHONPATH": str(HERE / "watch"),
        "PATH": canary(folder / "canaries"),
        "OMP_NUM_THREADS": str(threads),
    }
    done = subprocess.run([*alone(), *words], env=environment(cache, watched), capture_output=True, text=True)
    return done, starts.read_text().splitlines()


def fetchers(starts: list[str]) -> list[str]:
    """Of the programs that were started, those that install or fetch."""
    names = "|".join(CANARIES)
    return [line for line in starts if re.search(rf"(^|/|\s-m\s?)({names}|ensurepip)(\s|$)", line)]


def test_without_network_in_another_folder_with_other_threads_the_bytes_are_the_same(
    tiny_folder: Path, straight: Path, tmp_path: Path
) -> None:
    words = command(tiny_folder, tmp_path / "another folder" / "out")
    done, starts = run_alone(words, tmp_path / "another cache", tmp_path, threads=2)
    assert done.returncode == 0, done.stderr
    assert fetchers(starts) == []
    assert any("pnnx" in line for line in starts)  # the watch did see what was started
    assert any("diffusette.runtimes.mnn.native" in line for line in starts)
    found, expected = tree(tmp_path / "another folder" / "out"), tree(straight)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.mark.full
def test_the_demo_without_network_gives_the_same_bytes(tmp_path: Path) -> None:
    done, starts = run_alone(command("demo", tmp_path / "alone"), tmp_path / "one cache", tmp_path, threads=2)
    assert done.returncode == 0, done.stderr
    assert fetchers(starts) == []
    usual = environment(tmp_path / "other cache", {"OMP_NUM_THREADS": "1"})
    done = subprocess.run(command("demo", tmp_path / "usual"), env=usual, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "alone") == tree(tmp_path / "usual")


@pytest.mark.parametrize(
    "words",
    [
        [sys.executable, "-c", "import socket; socket.socket()"],
        [sys.executable, "-c", "import socket; socket.socket(socket.AF_INET6)"],
        [sys.executable, "-c", "import ctypes; ctypes.CDLL(None).socket(2, 1, 0)"],  # as native code does
        [sys.executable, "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1')"],
    ],
)
def test_a_socket_would_have_been_noticed(words: list[str], tmp_path: Path) -> None:
    """The proof above is worth what this says: the kernel ends who asks for a socket."""
    done, _ = run_alone(words, tmp_path / "cache", tmp_path, threads=1)
    assert done.returncode in (-31, 128 + 31)  # SIGSYS


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.system('pip install x')",
        "import ctypes; ctypes.CDLL(None).system(b'pip install x')",  # as native code does
        "import subprocess, sys; subprocess.run([sys.executable, '-m', 'pip', '--version'])",
        "import subprocess; subprocess.run(['curl', 'http://127.0.0.1'])",
    ],
)
def test_an_installer_would_have_been_noticed(code: str, tmp_path: Path) -> None:
    done, starts = run_alone([sys.executable, "-c", code], tmp_path / "cache", tmp_path, threads=1)
    assert fetchers(starts), (starts, done.stderr)


def test_a_local_socket_is_allowed(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import socket; socket.socketpair()"]
    done, starts = run_alone(words, tmp_path / "cache", tmp_path, threads=1)
    assert done.returncode == 0, done.stderr
    assert fetchers(starts) == []
