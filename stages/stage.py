"""A stage is a function of its key: looked up in the cache, else run in a child process and published."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from .hashing import sha256_of_json

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
