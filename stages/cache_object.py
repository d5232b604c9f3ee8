"""Objects of the cache: a folder that a stage wrote, and the record of its files beside them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .hashing import sha256_of_file

ARTIFACT: Final = "artifact.json"


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One finished stage; a record that cannot be read leaves `stage` empty and `label` "damaged"."""

    digest: str
    stage: str
    label: str
    bytes: int
    last_used: float  # seconds since the epoch
    folder: Path


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `artifact.json` says; None where it is absent, cannot be read, or is not what `run_stage` writes."""
    try:
        record: dict[str, Any] = json.loads((folder / ARTIFACT).read_bytes())
        sound = (
            isinstance(record["stage"], str)
            and isinstance(record["files"], dict)
            and {"facts", "measured"} <= record.keys()
            and all(isinstance(f["bytes"], int) and isinstance(f["sha256"], str) for f in record["files"].values())
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if sound else None


def describe_file(file: Path) -> dict[str, Any]:
    """What a record says of a file: size and sha256, and when it was written, in ns since the epoch."""
    state = file.stat()
    return {"bytes": state.st_size, "sha256": sha256_of_file(file), "written": state.st_mtime_ns}


def is_whole(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether each file is as recorded. Hashes only what was written since, or copied without its times."""
    for name, facts in record["files"].items():
        file = folder / name
        if not file.is_file():
            return False
        state = file.stat()
        if state.st_size != facts["bytes"]:
            return False
        if state.st_mtime_ns != facts.get("written") and sha256_of_file(file) != facts["sha256"]:
            return False
    return True


def read_entry(folder: Path) -> CacheEntry | None:
    """The object in `folder`, None if it went meanwhile."""
    record = read_record(folder)
    try:
        if record is None:
            files = [Path(at, name) for at, _, names in os.walk(folder) for name in names]
            size = sum(file.lstat().st_size for file in files)
            return CacheEntry(folder.name, "", "damaged", size, folder.stat().st_mtime, folder)
        used = (folder / ARTIFACT).stat().st_mtime
    except FileNotFoundError:
        return None
    size = sum(facts["bytes"] for facts in record["files"].values())
    return CacheEntry(folder.name, record["stage"], record.get("label", ""), size, used, folder)


def find_problem(folder: Path) -> str:
    """The first thing that is wrong with an object, empty if it is whole."""
    record = read_record(folder)
    if record is None:
        return f"{ARTIFACT} is damaged"
    for name, facts in record["files"].items():
        try:
            if sha256_of_file(folder / name) != facts["sha256"]:
                return f"{name} has changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def delete(path: Path) -> None:
    with suppress(FileNotFoundError):  # somebody else may delete it too
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
