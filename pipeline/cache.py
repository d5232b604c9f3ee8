"""A content-addressed store of finished stages.

`objects/ab/abcd…/` holds what a stage wrote, and `artifact.json` with the size and sha256 of each file. An object
appears by one rename, so a killed conversion leaves at most a scratch folder that the next one sweeps away.
The digest of an object is that of its stage's key: see `stage.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .errors import CheckpointError, ModelError
from .hashing import sha256_of_file

ARTIFACT: Final = "artifact.json"
SHORT: Final = 12  # hex digits of a digest that people see


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One finished stage."""

    digest: str
    stage: str
    label: str
    bytes: int
    last_used: float  # seconds since the epoch
    folder: Path


class Cache:
    """The store below `root`; safe under several processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def default(cls) -> Cache:
        """The user's cache: `$DIFFUSETTE_CACHE`, else the platform's cache folder."""
        import platformdirs

        chosen = os.environ.get("DIFFUSETTE_CACHE")
        cache = cls(Path(chosen) if chosen else Path(platformdirs.user_cache_dir("diffusette", appauthor=False)))
        cache.prepare()
        return cache

    def prepare(self) -> None:
        """Make the folders, and remove what processes that no longer live left behind."""
        from .publish import sweep

        try:
            for name in ("objects", "locks", "work", "sources"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(
                f"the cache folder {self.root} cannot be written: {error.strerror}",
                hint="set DIFFUSETTE_CACHE to a folder that you may write",
            ) from None
        sweep(self.root / "work")
        for shelf in (self.root / "objects").iterdir():
            sweep(shelf)

    @property
    def memo(self) -> Path:
        """Where hashes of source files are remembered."""
        return self.root

    def folder(self, digest: str) -> Path:
        """Where the object of that digest lies, or would."""
        return self.root / "objects" / digest[:2] / digest

    @contextmanager
    def lock(self, digest: str) -> Iterator[None]:
        """Hold the digest: a second process that wants the same stage waits, then finds it done."""
        from filelock import FileLock

        with FileLock(self.root / "locks" / digest):
            yield

    def read(self, digest: str) -> Mapping[str, Any] | None:
        """The record of an object, or None when there is none or it is damaged.

        A damaged object (missing file, other size, unreadable record) is removed, so that it is built again.
        """
        folder = self.folder(digest)
        try:
            record: dict[str, Any] = json.loads((folder / ARTIFACT).read_bytes())
            sizes = {name: facts["bytes"] for name, facts in record["files"].items()}
            whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
        except FileNotFoundError:
            whole = False
        except (ValueError, KeyError, TypeError):
            whole = False
        if whole:
            os.utime(folder / ARTIFACT)  # last use, for prune
            return record
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def entries(self) -> list[CacheEntry]:
        """All objects, the longest unused first."""
        found = []
        for file in (self.root / "objects").glob(f"*/*/{ARTIFACT}"):
            if file.parent.name.startswith("."):
                continue
            record = json.loads(file.read_bytes())
            size = sum(facts["bytes"] for facts in record["files"].values())
            used = file.stat().st_mtime
            found.append(
                CacheEntry(file.parent.name, record["stage"], record.get("label", ""), size, used, file.parent)
            )
        return sorted(found, key=lambda entry: entry.last_used)

    def damaged(self) -> Iterator[tuple[CacheEntry, str]]:
        """Read every byte again; yield each damaged object with the first file that is wrong."""
        for entry in self.entries():
            record = json.loads((entry.folder / ARTIFACT).read_bytes())
            for name, facts in record["files"].items():
                file = entry.folder / name
                if not file.is_file():
                    yield entry, f"{name} is missing"
                    break
                if sha256_of_file(file) != facts["sha256"]:
                    yield entry, f"{name} has changed"
                    break

    def remove(self, entry: CacheEntry) -> None:
        """Delete one object."""
        with self.lock(entry.digest):
            shutil.rmtree(entry.folder)

    def prune(self, keep_bytes: int) -> list[CacheEntry]:
        """Delete the longest unused objects until at most `keep_bytes` remain; return what went."""
        entries = self.entries()
        total, gone = sum(entry.bytes for entry in entries), []
        for entry in entries:
            if total <= keep_bytes:
                break
            self.remove(entry)
            total -= entry.bytes
            gone.append(entry)
        return gone

    def remember_source(self, digest: str, root: Path) -> None:
        """Note where the checkpoint of that digest lies, so that `validate` needs no --reference."""
        from .publish import written

        with written(self.root / "sources" / f"{digest}.json") as file:
            file.write_text(json.dumps({"root": str(root.resolve())}))

    def find_source(self, digest: str) -> Path:
        """The folder of the checkpoint of that digest.

        Raises:
            CheckpointError: this machine never converted it, or it has gone since.
        """
        note = self.root / "sources" / f"{digest}.json"
        hint = "name it: --reference CHECKPOINT"
        if not note.is_file():
            raise CheckpointError(
                "the checkpoint that this bundle was made from is not known on this machine", hint=hint
            )
        root = Path(json.loads(note.read_text())["root"])
        if not root.exists():
            raise CheckpointError(f"the checkpoint that this bundle was made from is no longer at {root}", hint=hint)
        return root
