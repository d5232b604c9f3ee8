"""AArch64 processors, played by QEMU's user mode: one process of another architecture, no kernel, no root.

The parts lie in one folder that `install` makes: the emulator, Debian's Python for arm64, and the runtimes' own arm64
wheels. `usr/bin/python3` in it is a wrapper that starts the emulator, so that `sys.executable` is the wrapper and
child processes start without binfmt_misc.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Final

from ...stages.errors import MissingTool, UsageError
from .lock import read_lock
from .machine import Machine

NAME: Final = "arm64"
FOLDER: Final = "DIFFUSETTE_MACHINES"
INSTALLED: Final = "installed.json"
PYTHON: Final = "usr/bin/python3"
WHEELS: Final = "wheels"

# Name -> what QEMU calls it, and what it has of the instructions that decide in what numbers a runtime computes.
# SVE and SME are off on `max`: numpy prints warnings under the one, KleidiAI has been seen to die under the other.
PROCESSORS: Final = {
    "cortex-a76": ("cortex-a76", "float16 arithmetic and dot products; phones since 2018"),
    "neoverse-n1": ("neoverse-n1", "float16 arithmetic and dot products; servers"),
    "cortex-a72": ("cortex-a72", "neither; Raspberry Pi 4, phones until 2017"),
    "cortex-a53": ("cortex-a53", "neither; small cores and boards"),
    "max": (
        "max,sve=off,sme=off",
        "all that QEMU knows, bfloat16 and 8-bit matrix products included, without SVE and SME",
    ),
}
DEFAULT: Final = "cortex-a76"


def folder() -> Path:
    """Where the parts lie, or are to lie: below `DIFFUSETTE_MACHINES`, or the user's data folder."""
    import platformdirs

    chosen = os.environ.get(FOLDER, "")
    root = Path(chosen) if chosen else Path(platformdirs.user_data_dir("diffusette", appauthor=False), "machines")
    return root.absolute() / NAME


def is_here() -> bool:
    """Whether this computer is itself an AArch64 one."""
    return platform.machine().lower() in ("aarch64", "arm64")


def arm64(processor: str = DEFAULT) -> Machine:
    """The machine with that processor, one of `PROCESSORS`.

    Raises:
        UsageError: no such processor, or this computer needs no emulator.
        MissingTool: the parts are not there, or are those of another version.
    """
    if processor not in PROCESSORS:
        known = "; ".join(f"{name}: {about}" for name, (_, about) in PROCESSORS.items())
        raise UsageError(f"no AArch64 processor named {processor!r}", hint=f"one of: {known}")
    if is_here():
        raise UsageError("this computer is an AArch64 one: nothing needs to be emulated", hint="--machine native")
    root = folder()
    refuse_absent(root)
    environment = {
        "QEMU_CPU": PROCESSORS[processor][0],
        "PYTHONPATH": os.pathsep.join([str(package_link(root)), str(root / WHEELS)]),
        # compiled once: to compile what a session imports takes longer than to run the demo's text encoder
        "PYTHONPYCACHEPREFIX": str(root / "pycache"),
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONHOME": "",
        "LD_LIBRARY_PATH": "",
        "LD_PRELOAD": "",
        "VIRTUAL_ENV": "",
    }
    return Machine(f"{NAME}:{processor}", (str(root / PYTHON),), environment)


def refuse_absent(root: Path) -> None:
    """Raise MissingTool unless `root` holds what `install` makes of today's lock."""
    setup = "diffusette machine setup arm64"
    try:
        installed = json.loads((root / INSTALLED).read_bytes())
    except FileNotFoundError:
        raise MissingTool(f"{root}: no AArch64 machine is set up", hint=f"run `{setup}` (`make arm64`)") from None
    except (OSError, ValueError) as error:
        raise MissingTool(f"{root / INSTALLED}: cannot be read: {error}", hint=f"run `{setup}` again") from None
    if installed.get("lock") != read_lock().digest:
        raise MissingTool(f"{root}: was set up by another version of diffusette", hint=f"run `{setup}` again")


def package_link(root: Path) -> Path:
    """A folder in which `diffusette` is this package, for the Python of `root`.

    Not the package's own parent: what else is installed there, for this processor, would be found too.
    """
    package = Path(__file__).resolve().parents[2]
    place = root / "packages" / hashlib.sha256(os.fsencode(package)).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (place / "diffusette").symlink_to(package)
    return place
