"""`diffusette machine setup arm64`: fetch, check and unpack what an emulated machine is made of."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from ...stages.errors import MissingTool, UsageError
from ...stages.publish import published
from . import arm64
from .debian import Apt, Offered, unpack
from .lock import Pinned, read_lock

_DEBIAN_NAMES: Final = {"x86_64": "amd64", "amd64": "amd64"}
_EMULATOR: Final = "./usr/bin/qemu-aarch64"
# Platform tags of wheels for arm64, the newest glibc that the pinned userland satisfies first.
PLATFORMS: Final = tuple(f"manylinux{glibc}_aarch64" for glibc in ("_2_28", "_2_27", "_2_26", "_2_24", "_2_17", "2014"))

Say = Callable[[str], None]


def set_up_arm64(say: Say, *, locked: bool = False) -> Path:
    """Make the folder of the emulated AArch64 machine anew; it appears whole or not at all.

    Debian replaces packages in a released suite. One that is newer than the lock is taken if the suite's signature
    vouches for it, and `say` names it.

    Args:
        locked: refuse newer packages.
    Raises:
        UsageError: this computer is an AArch64 one.
        MissingTool: apt, pip or the network is not there, or a file is not the one that is pinned.
    """
    if arm64.is_here():
        raise UsageError("this computer is an AArch64 one: nothing needs to be emulated", hint="--machine native")
    lock, place = read_lock(), arm64.folder()
    host = _DEBIAN_NAMES.get(platform.machine().lower(), "")
    if host not in lock.emulator:
        raise MissingTool(
            f"no emulator is pinned for {platform.machine()}", hint=f"it runs on {', '.join(lock.emulator)} with Debian"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    with published(place, existing="replace") as scratch:
        (scratch / "apt").mkdir()
        root = scratch
        for name in ("bin", "lib", "sbin"):
            (root / "usr" / name).mkdir(parents=True)
            (root / name).symlink_to(f"usr/{name}")
        say("Debian's userland for arm64")
        taken = _packages(scratch / "apt/userland", "arm64", lock.userland_suites, lock.userland, root, say, locked)
        say("the emulator")
        emulator = (lock.emulator[host],)
        suites = (lock.emulator_suite,)
        taken += _packages(scratch / "apt/emulator", host, suites, emulator, root, say, locked, only=_EMULATOR)
        say("the runtimes' wheels for arm64")
        _wheels(lock.wheels, scratch)
        shutil.rmtree(scratch / "apt")
        _wrapper(root, place)
        facts = {"lock": lock.digest, "packages": {each.pinned.name: [each.version, each.sha256] for each in taken}}
        (scratch / arm64.INSTALLED).write_text(json.dumps(facts, indent=1) + "\n")
    _try_out()
    return place


def _packages(
    work: Path,
    architecture: str,
    suites: Sequence[str],
    wanted: Sequence[Pinned],
    root: Path,
    say: Say,
    locked: bool,
    only: str = "",
) -> tuple[Offered, ...]:
    apt = Apt(work, architecture, suites)
    offered = apt.offers(wanted)
    for each in offered:
        if each.is_newer:
            what = f"{each.pinned.name} {each.version} (pinned: {each.pinned.version})"
            if locked:
                raise MissingTool(
                    f"Debian has replaced {what}", hint="leave out --locked, or pin anew: `make pin-arm64`"
                )
            say(f"  newer than pinned, signed by Debian: {what}")
    for file in apt.fetch(offered):
        unpack(file, root, only)
    return offered


def _wheels(wheels: Sequence[Pinned], scratch: Path) -> None:
    """Install the pinned wheels for arm64, each with the sha256 that it must have. pip's own settings say from where.

    Raises:
        MissingTool: pip cannot get one, or it is another file.
    """
    wanted = scratch / "requirements.txt"
    wanted.write_text("".join(f"{each.name}=={each.version} --hash=sha256:{each.sha256}\n" for each in wheels))
    done = subprocess.run(
        [*pip_for_arm64("install"), "--target", str(scratch / arm64.WHEELS), "--require-hashes", "-r", str(wanted)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-3:]
        raise MissingTool(f"pip ended with {done.returncode}: {' '.join(said)}", hint="can the network be reached?")
    wanted.unlink()


def pip_for_arm64(command: str) -> list[str]:
    """The beginning of a pip command line that takes wheels of the emulated Python and none of this one."""
    platforms = [argument for tag in PLATFORMS for argument in ("--platform", tag)]
    only = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", "3.11", *platforms]
    return [sys.executable, "-P", "-m", "pip", command, "--quiet", "--no-compile", "--disable-pip-version-check", *only]


def _wrapper(root: Path, place: Path) -> None:
    """`python3`, a program of this computer that starts the emulated one; `-0`: which then takes it for itself."""
    file = root / arm64.PYTHON
    file.unlink(missing_ok=True)
    emulator, python = place / _EMULATOR, f"{place / arm64.PYTHON}.11"
    file.write_text(f'#!/bin/sh\nexec "{emulator}" -L "{place}" -0 "$0" "{python}" "$@"\n')
    file.chmod(0o755)


def _try_out() -> None:
    """Start the machine once.

    Raises:
        MissingTool: it does not run.
    """
    machine = arm64.arm64()
    done = subprocess.run(
        [*machine.python, "-c", "import platform, numpy; print(platform.machine(), int(numpy.ones(3).sum()))"],
        env=machine.environment_of(dict(os.environ)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.stdout.split() != ["aarch64", "3"]:
        raise MissingTool(
            f"the emulated machine does not start (status {done.returncode}): {done.stderr.strip()[-300:]}",
            hint="run `diffusette machine setup arm64` again; if it stays, report this with your Debian version",
        )
