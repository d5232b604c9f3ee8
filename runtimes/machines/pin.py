"""Write lock.json anew: what Debian's suites and the package index hold today. `make pin-arm64` runs it.

Versions of wheels are those of constraints.txt, so that the emulated machine runs what the tests ran here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from .debian import Apt
from .install import pip_for_arm64
from .lock import FILE, Pinned, read_lock


def pin(constraints: Path) -> None:
    """Replace lock.json: the same packages, in the versions of today and of `constraints`."""
    old, stated = read_lock(), json.loads(FILE.read_text())
    with tempfile.TemporaryDirectory(prefix="diffusette-pin-") as folder:
        userland = Apt(Path(folder, "userland"), "arm64", old.userland_suites).offers(old.userland)
        stated["userland"]["packages"] = {
            each.pinned.name: {"version": each.version, "sha256": each.sha256} for each in userland
        }
        for architecture, emulator in old.emulator.items():
            (found,) = Apt(Path(folder, architecture), architecture, (old.emulator_suite,)).offers((emulator,))
            entry = {"version": found.version, "sha256": found.sha256}
            stated["emulator"]["packages"][architecture] = {emulator.name: entry}
    versions = dict(line.split("==") for line in constraints.read_text().splitlines() if "==" in line)
    known = {_canonical(name): version for name, version in versions.items()}
    stated["wheels"] = _resolved([Pinned(each.name, known[_canonical(each.name)], "") for each in old.wheels])
    FILE.write_text(json.dumps(stated, indent=1) + "\n")


def _resolved(wheels: list[Pinned]) -> dict[str, dict[str, str]]:
    """Name -> version and sha256 of the arm64 wheel, as pip would install it."""
    command = [*pip_for_arm64("install"), "--dry-run", "--ignore-installed", "--report", "-", "--target", "unused"]
    names = [f"{each.name}=={each.version}" for each in wheels]
    report = json.loads(subprocess.run([*command, *names], stdout=subprocess.PIPE, check=True).stdout)
    found = {
        _canonical(each["metadata"]["name"]): {
            "version": each["metadata"]["version"],
            "sha256": each["download_info"]["archive_info"]["hashes"]["sha256"],
        }
        for each in report["install"]
    }
    return {each.name: found[_canonical(each.name)] for each in wheels}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    pin(Path(sys.argv[1]))
