"""What a family of checkpoints is: data that recognises it, names its parts, and translates old spellings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Headers:
    """All that detection may look at: no tensor data.

    `parts` maps a component folder to its class in model_index.json; `configs` and `tensors` have the same keys.
    A lone file has one part, named "".
    """

    pipeline: str = ""  # model_index.json's `_class_name`
    parts: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, Shape]] = field(default_factory=dict)

    def classes(self) -> Iterator[str]:
        """Every class name that the pipeline and the configs state."""
        yield self.pipeline
        yield from self.parts.values()
        for config in self.configs.values():
            yield str(config.get("_class_name", ""))
            yield from map(str, config.get("architectures") or ())

    def setting(self, path: str) -> Any:
        """A config value by "part.key"; None when the part or the key is absent, as diffusers treats it."""
        part, _, key = path.partition(".")
        return self.configs.get(part, {}).get(key)

    def tensor(self, pattern: str) -> str | None:
        """The first tensor whose name the regular expression finds."""
        names = (name for part in self.tensors.values() for name in part)
        return next((name for name in names if re.search(pattern, name)), None)


@dataclass(frozen=True, slots=True)
class Signature:
    """Facts that give a kind of checkpoint away. It fits when every fact that it states holds."""

    parts: tuple[str, ...] = ()  # folders that model_index.json lists
    classes: str = ""  # regular expression that some class name fully matches
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # "part.key" -> values allowed
    equal: tuple[tuple[str, str], ...] = ()  # pairs of "part.key" with one value
    tensors: tuple[str, ...] = ()  # regular expressions, each found in some tensor name

    def compare(self, headers: Headers) -> tuple[list[str], list[str]]:
        """The facts that hold and those that do not, in words."""
        held: list[str] = []
        failed: list[str] = []
        for part in self.parts:
            (held if part in headers.parts else failed).append(f"{part}/ in model_index.json")
        if self.classes:
            found = next((name for name in headers.classes() if re.fullmatch(self.classes, name)), None)
            if found is not None:
                held.append(f"class {found}")
            else:
                failed.append(f"a class like {self.classes}")
        for path, allowed in self.settings.items():
            value = headers.setting(path)
            if value in allowed:
                held.append(f"{path} = {value!r}")
            else:
                failed.append(f"{path} = {value!r}, not {' or '.join(map(repr, allowed))}")
        for one, other in self.equal:
            a, b = headers.setting(one), headers.setting(other)
            (held if a == b else failed).append(f"{one} = {a!r} {'=' if a == b else '!='} {other}" + ("" if a == b else f" = {b!r}"))
        for pattern in self.tensors:
            name = headers.tensor(pattern)
            if name is not None:
                held.append(f"tensor {name}")
            else:
                failed.append(f"a tensor like {pattern}")
        return held, failed

    def evidence(self, headers: Headers) -> str | None:
        """The facts, in words, if all of them hold."""
        held, failed = self.compare(headers)
        return None if failed or not held else ", ".join(held)


@dataclass(frozen=True, slots=True)
class Part:
    """One component: the folder that holds it, and how its stored names become those of today's classes."""

    folder: str
    classes: tuple[str, ...]  # class names that model_index.json may give it
    required: Mapping[str, type]  # config keys without which no module can be built, and their JSON type
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what old configs leave out
    weights: str = ""  # regular expression of the tensors that belong to it; "" = all
    ignored: str = r"(?!)"  # tensors that old versions stored and today's classes compute
    renames: tuple[tuple[str, str], ...] = ()  # (regular expression, replacement): old spelling -> today's
    squeezed: str = r"(?!)"  # tensors stored as 1x1 convolutions [out, in, 1, 1], today linear [out, in]


@dataclass(frozen=True, slots=True)
class Family:
    """Checkpoints that share an architecture and are converted alike."""

    name: str
    title: str
    components: Mapping[str, Part]
    signature: Signature

    def detect(self, headers: Headers) -> str | None:
        """Evidence, for people, that `headers` are of this family; None when they are not."""
        return self.signature.evidence(headers)


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Something that people do hand in, and that is refused by its name."""

    name: str
    why: str
    signatures: tuple[Signature, ...]  # any of them
    hint: str = ""

    def detect(self, headers: Headers) -> str | None:
        """Evidence, for people, that `headers` are this; None when they are not."""
        found = (signature.evidence(headers) for signature in self.signatures)
        return next((evidence for evidence in found if evidence is not None), None)
