"""A stage is a function of its key: looked up in the cache, else run in a child process and published."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, get_args

from .hashing import sha256_of_json

Out = TypeVar("Out")
Out_co = TypeVar("Out_co", covariant=True)


class Stage(Generic[Out_co]):
    """A frozen dataclass whose fields are its inputs (JSON-able values, paths, artifacts of earlier stages).

    `Out_co` is the frozen dataclass that `run` returns; it has `folder: Path` and `digest: str`. A class says

        @dataclass(frozen=True)
        class Simplify(Stage[Graph], name="simplify", version=1, tools=("onnx",)):

    Args:
        version: +1 whenever equal inputs may give other bytes.
        tools: distributions whose versions decide the output.
        aside: fields that do not.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    tools: ClassVar[tuple[str, ...]]
    aside: ClassVar[tuple[str, ...]]
    output: ClassVar[type]

    def __init_subclass__(
        cls, *, name: str = "", version: int = 0, tools: tuple[str, ...] = (), aside: tuple[str, ...] = ()
    ) -> None:
        super().__init_subclass__()
        if name:  # else it is another stage, changed a little
            cls.name, cls.version, cls.tools, cls.aside = name, version, tools, aside
            (cls.output,) = get_args(cls.__orig_bases__[0])  # type: ignore[attr-defined]

    def key(self) -> Mapping[str, object]:
        """All that decides the output, JSON-able: digests of inputs rather than their paths."""
        names = (field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return {name: _keyed(getattr(self, name)) for name in names if name not in self.aside}

    def run(self, into: Path) -> Out_co:
        """Do the work, write under `into` only, return the artifact with `folder=into`. Runs in a child process."""
        raise NotImplementedError


class Runner(Protocol):
    """`run(stage)`: the stage's artifact, from the cache or fresh."""

    def __call__(self, stage: Stage[Out]) -> Out: ...


def _keyed(value: Any) -> Any:
    """What a key has of a field.

    Raises:
        TypeError: it says nothing of a content, as a path does.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): _keyed(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_keyed(each) for each in value]
    if hasattr(value, "key"):
        return value.key()
    if hasattr(value, "digest"):
        return [value.digest, getattr(value, "component", "")]  # the halves of a VAE share their files
    if dataclasses.is_dataclass(value):
        return {field.name: _keyed(getattr(value, field.name)) for field in dataclasses.fields(value)}
    raise TypeError(f"{value!r} cannot be part of a key")


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
    precision = getattr(stage, "precision", "") or getattr(getattr(stage, "plan", None), "label", "")
    return " ".join(word for word in (_component_of(stage), stage.name, runtime, precision, form) if word)


def place_of(stage: Stage[Any]) -> str:
    """What a forecast calls a stage, at any precision: `unet gate ncnn`."""
    return " ".join(word for word in (_component_of(stage), stage.name, getattr(stage, "runtime", "")) if word)


def _component_of(stage: Stage[Any]) -> str:
    component = getattr(stage, "component", None)
    if component is None:
        fields = (getattr(stage, field.name) for field in dataclasses.fields(stage))  # type: ignore[arg-type]
        component = next((value.component for value in fields if hasattr(value, "component")), "")
    return str(component)
