"""A stage is a function of its key: looked up in the cache, else run in a child process and published."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from .cache import Cache
from .cache_object import ARTIFACT, describe_file
from .hashing import sha256_of_json
from .progress import Progress

Out = TypeVar("Out")
Out_co = TypeVar("Out_co", covariant=True)


class Stage(Protocol[Out_co]):
    """A frozen dataclass whose fields are its inputs (JSON-able values, paths, artifacts of earlier stages)."""

    name: ClassVar[str]
    version: ClassVar[int]  # +1 whenever equal inputs may give other bytes
    tools: ClassVar[tuple[str, ...]]  # distributions whose versions decide the output
    output: ClassVar[type]  # the frozen dataclass that `run` returns; has `folder: Path` and `digest: str`

    def key(self) -> Mapping[str, object]:
        """All that decides the output, JSON-able: digests of inputs rather than their paths."""
        ...

    def run(self, into: Path) -> Out_co:
        """Do the work, write under `into` only, return the artifact with `folder=into`. Runs in a child process."""
        ...


class Runner(Protocol):
    """`run(stage)`: the stage's artifact, from the cache or fresh."""

    def __call__(self, stage: Stage[Out]) -> Out: ...


def digest_of(stage: Stage[Any]) -> str:
    """The address of a stage's result: its name, version, key, and the versions of its tools."""
    tools = {name: _version(name) for name in stage.tools}
    return sha256_of_json({"name": stage.name, "version": stage.version, "key": dict(stage.key()), "tools": tools})


@cache
def _version(tool: str) -> str:
    """Of the installed distribution. Asked once: a stage's key names several, and each look takes milliseconds."""
    return version_of(tool)


def label_of(stage: Stage[Any]) -> str:
    """How people see a stage: `unet export`, or `unet gate ort fp16` where it is one runtime's own."""
    form, runtime = getattr(stage, "form", ""), getattr(stage, "runtime", "")
    if form and runtime:
        form = f".{form}"  # of the runtime's files, known by how their names end
    more = (runtime, getattr(stage, "precision", ""), form)
    return " ".join(word for word in (_component_of(stage), stage.name, *more) if word)


def place_of(stage: Stage[Any]) -> str:
    """What a forecast calls a stage, at any precision: `unet gate ncnn`."""
    return " ".join(word for word in (_component_of(stage), stage.name, getattr(stage, "runtime", "")) if word)


def _component_of(stage: Stage[Any]) -> str:
    component = getattr(stage, "component", None)
    if component is None:
        fields = (getattr(stage, field.name) for field in dataclasses.fields(stage))  # type: ignore[arg-type]
        component = next((value.component for value in fields if hasattr(value, "component")), "")
    return str(component)


def run_stage(stage: Stage[Out], cache: Cache, progress: Progress) -> Out:
    """Return the stage's artifact: from `cache`, or by running the stage in a child process.

    Raises:
        DiffusetteError: what the stage raised in its child, or `ToolCrashed`/`NoRoom` when the child died.
    """
    from .child import run_in_child
    from .publish import published

    digest, label = digest_of(stage), label_of(stage)
    with cache.lock(digest):
        record = cache.read(digest)
        if record is not None:
            progress.reused(label, digest, record["measured"])
            return _load(stage, record, cache.folder(digest))
        with progress.running(label, digest) as watch, published(cache.folder(digest)) as scratch:
            facts, measured = run_in_child(stage, scratch, cache.root / "work", watch)
            files = {
                file.relative_to(scratch).as_posix(): describe_file(file)
                for file in sorted(scratch.rglob("*"))
                if file.is_file()
            }
            record = {"stage": stage.name, "label": label, "facts": facts, "files": files, "measured": measured}
            (scratch / ARTIFACT).write_text(json.dumps(record, indent=1, sort_keys=True))
        return _load(stage, record, cache.folder(digest))


def _load(stage: Stage[Out], record: Mapping[str, Any], folder: Path) -> Out:
    from .strict import adapter

    facts = {**record["facts"], "folder": str(folder), "digest": folder.name}
    artifact: Out = adapter(stage.output).validate_python(facts)
    return artifact
