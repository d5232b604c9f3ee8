"""A content-addressed store of finished stages.

`objects/ab/abcd…/` holds what a stage wrote, and `artifact.json` with the size and sha256 of each file. An object
appears by one rename, so a killed conversion leaves at most a scratch folder that the next one sweeps away.
The digest of an object is that of its stage's key: see `stage.py`. Who reads objects holds `in-use` together with
other readers, and who removes them holds it alone, so nothing goes while a conversion still needs it.

What a hit is checked for, docs/decisions/0008: every file is there, with its size and the time at which it was written;
one of another time is hashed. Bytes that a disk changes by itself are found by `verify`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from .artifacts import ALONE, Companions
from .cache_object import ARTIFACT, CacheEntry, delete, find_problem, is_whole, read_entry, read_record
from .errors import CheckpointError, ModelError, UsageError

CAP: Final = "DIFFUSETTE_CACHE_SIZE"
SHORT: Final = 12  # hex digits of a digest that people see
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


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
        """Make the folders, and remove what processes that no longer live left behind.

        Raises:
            ModelError: the system refuses it.
        """
        from .publish import sweep

        with self._reached():
            for name in ("objects", "locks", "work", "sources"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            sweep(self.root / "work")
            for shelf in (self.root / "objects").iterdir():
                if shelf.is_dir():  # file browsers leave files of their own everywhere
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
        """Hold the digest: a second process that wants the same stage waits, then finds it done.

        Raises:
            ModelError: the system refuses it.
        """
        with self._flock(f"locks/{digest}", fcntl.LOCK_EX):
            yield

    @contextmanager
    def used(self, alone: bool = False) -> Iterator[None]:
        """Use the cache during the block: its objects stay. `alone` is for the block that removes some.

        Waits for the end of a removal; one that wants to be alone waits for another such, but not for users.

        Raises:
            UsageError: `alone`, and somebody else uses the cache.
            ModelError: the system refuses it.
        """
        if not alone:
            with self._flock("in-use", fcntl.LOCK_SH):
                yield
            return
        with self._flock("removal", fcntl.LOCK_EX), self._flock("in-use", fcntl.LOCK_EX | fcntl.LOCK_NB):
            yield

    @contextmanager
    def _flock(self, name: str, how: int) -> Iterator[None]:
        place = self.root / name
        with self._reached():
            place.parent.mkdir(parents=True, exist_ok=True)
            file = place.open("ab")
        with file:  # closing it unlocks it, and so does the end of the process, however it comes
            with self._reached():
                try:
                    fcntl.flock(file, how)
                except BlockingIOError:
                    raise UsageError(
                        f"a conversion is using the cache at {self.root}",
                        hint="wait until it (or whatever else reads the cache) has ended, then try again",
                    ) from None
            yield

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Name the folder and the way out where the system refuses the block something."""
        try:
            yield
        except OSError as error:
            at = f" ({error.filename})" if error.filename else ""
            raise ModelError(
                f"the cache folder {self.root} cannot be used: {error.strerror or error}{at}",
                hint="set DIFFUSETTE_CACHE to a folder that you may write",
            ) from error

    def read(self, digest: str) -> Mapping[str, Any] | None:
        """The record of an object, or None when there is none or it is damaged.

        A damaged object (missing file, other size, changed since with other bytes, unreadable record) is removed, so
        that it is built again.

        Raises:
            ModelError: the system refuses it.
        """
        folder = self.folder(digest)
        with self._reached():
            record = read_record(folder)
            if record is not None and is_whole(folder, record):
                os.utime(folder / ARTIFACT)  # last use, for prune
                return record
            delete(folder)
        return None

    def entries(self) -> list[CacheEntry]:
        """All objects, damaged ones too, the longest unused first."""
        with self._reached():
            folders = [f for f in (self.root / "objects").glob("*/*") if _DIGEST.fullmatch(f.name) and f.is_dir()]
            found = [entry for folder in folders if (entry := read_entry(folder))]
        return sorted(found, key=lambda entry: entry.last_used)

    def damaged(self) -> Iterator[tuple[CacheEntry, str]]:
        """Read every byte again; yield each damaged object with the first file that is wrong."""
        for entry in self.entries():
            if problem := find_problem(entry.folder):
                yield entry, problem

    def remove(self, entry: CacheEntry) -> None:
        """Delete one object, if it is still there; the caller holds `used(alone=True)`."""
        with self.lock(entry.digest), self._reached():
            delete(entry.folder)

    def prune(self, keep_bytes: int) -> list[CacheEntry]:
        """Delete the longest unused objects until at most `keep_bytes` remain; return what went.

        Raises:
            UsageError: a conversion is using the cache.
        """
        with self.used(alone=True):
            entries = self.entries()
            total, gone = sum(entry.bytes for entry in entries), []
            for entry in entries:
                if total <= keep_bytes:
                    break
                self.remove(entry)
                total -= entry.bytes
                gone.append(entry)
        return gone

    def cap(self) -> int | None:
        """Bytes that may stay after a conversion, by `$DIFFUSETTE_CACHE_SIZE`; None where nothing is said.

        Raises:
            UsageError: it is no size.
        """
        from .disk import parse_bytes

        text = os.environ.get(CAP, "")
        try:
            return parse_bytes(text) if text else None
        except UsageError as error:
            raise UsageError(f"{CAP}: {error.what}", hint=error.hint) from None

    def keep_to_cap(self) -> list[CacheEntry]:
        """Prune to the cap, unless somebody uses the cache: then it is the last of them who does."""
        cap = self.cap()
        if cap is None:
            return []
        try:
            return self.prune(cap)
        except UsageError:
            return []

    def remember_source(self, digest: str, root: Path, companions: Companions = ALONE) -> None:
        """Note where the checkpoint of that digest lies and what was given beside it, so that `validate` finds both."""
        from pydantic import TypeAdapter

        from .publish import written

        beside = TypeAdapter(Companions).dump_python(companions, mode="json")
        with written(self.root / "sources" / f"{digest}.json") as file:
            file.write_text(json.dumps({"root": str(root.resolve()), "companions": beside}))

    def find_source(self, digest: str) -> tuple[Path, Companions]:
        """The folder or file of the checkpoint of that digest, and what was given beside it.

        Raises:
            CheckpointError: this machine never converted it, or it has gone since.
        """
        note = self.root / "sources" / f"{digest}.json"
        hint = "name it: --reference CHECKPOINT"
        if not note.is_file():
            raise CheckpointError(
                "the checkpoint that this bundle was made from is not known on this machine", hint=hint
            )
        content = json.loads(note.read_text())
        root = Path(content["root"])
        if not root.exists():
            raise CheckpointError(f"the checkpoint that this bundle was made from is no longer at {root}", hint=hint)
        return root, self.companions_of(digest)

    def remember_memory(self, manifest: str, stages: list[dict[str, Any]]) -> None:
        """Note what the stages took that made the bundle whose manifest has that digest."""
        from .publish import written

        with written(self.root / "memory" / f"{manifest}.json") as file:
            file.write_text(json.dumps(stages))

    def find_memory(self, manifest: str) -> list[dict[str, Any]]:
        """What `remember_memory` noted; nothing where the bundle was not converted on this machine."""
        note = self.root / "memory" / f"{manifest}.json"
        found: list[dict[str, Any]] = json.loads(note.read_text()) if note.is_file() else []
        return found

    def companions_of(self, digest: str) -> Companions:
        """What was given beside the checkpoint of that digest; nothing where this machine does not know it."""
        from pydantic import TypeAdapter

        note = self.root / "sources" / f"{digest}.json"
        if not note.is_file():
            return ALONE
        return TypeAdapter(Companions).validate_python(json.loads(note.read_text()).get("companions", {}))
