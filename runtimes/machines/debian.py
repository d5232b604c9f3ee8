"""Debian packages by name, version and sha256, through the machine's own apt: unpacked into a folder, never installed.

apt gets state and cache folders of its own, so that it knows another architecture and another suite and leaves the
machine's alone. Addresses, proxies and keys are the machine's: nothing here names a host. None of it needs root.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...stages.errors import MissingTool
from ...stages.hashing import sha256_of_file
from .lock import Pinned

_SOURCES: Final = Path("/etc/apt")
_SECURITY: Final = "-security"
_OFFERED: Final = re.compile(r"'(?P<uri>[^']+)' (?P<file>\S+) \d+ SHA256:(?P<sha256>[0-9a-f]{64})")
_NOT_HERE: Final = "a Debian machine with apt is needed; elsewhere, a Debian container with this checkout in it does"


@dataclass(frozen=True, slots=True)
class Archive:
    """Where this machine fetches Debian from: an address, and the key that signs it (empty: apt's trusted ones)."""

    uri: str
    signed_by: str
    security: bool  # holds the suites of security updates


@dataclass(frozen=True, slots=True)
class Offered:
    """What the archive has for a pinned package. apt has checked its sha256 against the suite's signature."""

    pinned: Pinned
    version: str
    sha256: str
    file: str

    @property
    def is_newer(self) -> bool:
        return (self.version, self.sha256) != (self.pinned.version, self.pinned.sha256)


def archives(folder: Path = _SOURCES) -> tuple[Archive, ...]:
    """The Debian archives of apt's source files, in both of their formats (sources.list(5)).

    Raises:
        MissingTool: there is no apt here, or it has no sources.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise MissingTool("apt-get and dpkg-deb are not on PATH", hint=_NOT_HERE)
    found: list[Archive] = []
    for file in sorted([folder / "sources.list", *folder.glob("sources.list.d/*")]):
        if file.suffix == ".sources":
            found += _stanzas(file.read_text(errors="replace"))
        elif file.suffix == ".list" and file.is_file():
            found += _lines(file.read_text(errors="replace"))
    if not found:
        raise MissingTool(f"{folder}: apt has no sources", hint=_NOT_HERE)
    return tuple(dict.fromkeys(found))


def _stanzas(text: str) -> Iterator[Archive]:
    for stanza in re.split(r"\n\s*\n", text):
        pairs = (line.split(":", 1) for line in stanza.splitlines() if ":" in line and not line.startswith(("#", " ")))
        fields = {name.strip().lower(): value.strip() for name, value in pairs}
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        signed = fields.get("signed-by", "")
        for uri in fields.get("uris", "").split():
            security = any(_SECURITY in suite for suite in fields.get("suites", "").split())
            yield Archive(uri, signed if signed.startswith("/") else "", security)


def _lines(text: str) -> Iterator[Archive]:
    for line in text.splitlines():
        if match := re.fullmatch(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+).*", line.strip()):
            options = dict(option.split("=", 1) for option in (match["options"] or "").split() if "=" in option)
            yield Archive(match["uri"], options.get("signed-by", ""), _SECURITY in match["suite"])


class Apt:
    """apt for one architecture and some suites, with all that it writes below `folder`.

    Raises:
        MissingTool: a suite cannot be read.
    """

    def __init__(self, folder: Path, architecture: str, suites: Sequence[str]) -> None:
        self._folder = folder
        for part in ("state/lists/partial", "cache/archives/partial", "parts"):
            (folder / part).mkdir(parents=True)
        (folder / "state/status").touch()
        (folder / "sources.list").write_text("".join(_sources(architecture, suites)))
        settings = {
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Sandbox::User": "",  # the folder is this user's
            "Acquire::Languages": "none",
            "Dir::State": folder / "state",
            "Dir::State::status": folder / "state/status",
            "Dir::Cache": folder / "cache",
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": folder / "parts",
            "Dir::Etc::preferences": folder / "no-preferences",
            "Dir::Etc::preferencesparts": folder / "parts",
        }
        (folder / "apt.conf").write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
        self._run("update", "--error-on=any")

    def offers(self, wanted: Iterable[Pinned]) -> tuple[Offered, ...]:
        """What the suites have under the names that are pinned.

        Raises:
            MissingTool: a package is in none of them.
        """
        pinned = {each.name: each for each in wanted}
        offered = {}
        for line in self._run("download", "--print-uris", *pinned).splitlines():
            if match := _OFFERED.search(line):
                name, version, _ = match["file"].rsplit(".", 1)[0].split("_")
                offered[name] = Offered(pinned[name], version.replace("%3a", ":"), match["sha256"], match["file"])
        if missing := sorted(pinned.keys() - offered.keys()):
            raise MissingTool(f"apt offers no {', '.join(missing)} with a sha256", hint=_NOT_HERE)
        return tuple(offered[name] for name in pinned)

    def fetch(self, offered: Sequence[Offered]) -> tuple[Path, ...]:
        """Download, and compare the bytes with the sha256 that was offered.

        Raises:
            MissingTool: a download failed, or is not what was offered.
        """
        self._run("download", *(f"{each.pinned.name}={each.version}" for each in offered))
        files = tuple(self._folder / each.file for each in offered)
        for file, each in zip(files, offered, strict=True):
            if not file.is_file() or sha256_of_file(file) != each.sha256:
                raise MissingTool(f"{file.name} is not the file that apt announced", hint="run the same command again")
        return files

    def _run(self, *arguments: str) -> str:
        environment = {**os.environ, "APT_CONFIG": str(self._folder / "apt.conf"), "LC_ALL": "C"}
        done = subprocess.run(
            ["apt-get", "-q", *arguments],
            cwd=self._folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.startswith("E:")]
            raise MissingTool(
                f"apt-get {arguments[0]} ended with {done.returncode}: {' '.join(said) or done.stderr.strip()[-300:]}",
                hint="can the network be reached? apt's own sources are used, with Debian's suites",
            )
        return done.stdout


def _sources(architecture: str, suites: Sequence[str]) -> Iterator[str]:
    """Lines of a sources.list for `suites`: security updates from the machine's address for these, if it has one."""
    known = archives()
    for suite in suites:
        security = _SECURITY in suite
        for archive in (each for each in known if each.security == security):
            signed = f" signed-by={archive.signed_by}" if archive.signed_by else ""
            yield f"deb [arch={architecture}{signed}] {archive.uri} {suite} main\n"


def unpack(package: Path, root: Path, only: str = "") -> None:
    """The files of a Debian package below `root`, in which /bin, /lib and /sbin are links to /usr's; `only`: one path.

    Raises:
        MissingTool: dpkg-deb or tar refuses it.
    """
    command = ["tar", "--extract", "--keep-directory-symlink", "--no-same-owner", "--directory", str(root)]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as source:
        done = subprocess.run(
            [*command, *([only] if only else [])], stdin=source.stdout, capture_output=True, text=True, check=False
        )
        if source.stdout:
            source.stdout.close()
        source.wait()
    if done.returncode or (source.returncode and not only):
        raise MissingTool(f"{package.name} cannot be unpacked: {done.stderr.strip()[-300:]}", hint="is the disk full?")
