"""What a family of checkpoints is: data that recognises it, names its parts, and translates old spellings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Shape = tuple[int, ...]

STATES: Final = "diffusette_states"
"""Key that a family adds to a text encoder's config: which hidden states the UNet reads; absent: the last ones."""
PENULTIMATE: Final = "penultimate"  # what the last layer is given, without a final norm

TAKES_RESIDUALS: Final = "diffusette_takes_residuals"
"""Key that a UNet's config gets where a ControlNet goes with it: what that gives are inputs of the UNet then."""


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
    settings: Mapping[str, Any] = field(default_factory=dict)  # model_index.json's other entries that count

    def classes(self) -> Iterator[str]:
        """Every class name that the pipeline and the configs state."""
        yield self.pipeline
        yield from self.parts.values()
        for config in self.configs.values():
            yield str(config.get("_class_name", ""))
            architectures = config.get("architectures")
            yield from map(str, architectures if isinstance(architectures, list) else ())

    def setting(self, path: str) -> Any:
        """A config value by "part.key"; None when the part or the key is absent, as diffusers treats it."""
        part, _, key = path.partition(".")
        return self.configs.get(part, {}).get(key)

    def tensor(self, pattern: str) -> str | None:
        """The first tensor whose name the regular expression finds."""
        names = (name for part in self.tensors.values() for name in part)
        return next((name for name in names if re.search(pattern, name)), None)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A signature held against headers, fact by fact, in words."""

    holds: tuple[str, ...]
    fails: tuple[str, ...]
    missing: tuple[str, ...]  # parts that the signature asks for and model_index.json does not list


@dataclass(frozen=True, slots=True)
class Signature:
    """Facts that give a kind of checkpoint away. It fits when every fact that it states holds."""

    lone: bool = False  # one file, or the folder of one model, without a pipeline around it
    parts: tuple[str, ...] = ()  # components that model_index.json lists
    classes: str = ""  # regular expression that some class name fully matches
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # "part.key" -> values that fit
    given: tuple[str, ...] = ()  # "part.key" with any value but null
    equal: tuple[tuple[str, str], ...] = ()  # pairs of "part.key" with one value
    tensors: tuple[str, ...] = ()  # regular expressions, each found in some tensor name

    def compare(self, headers: Headers) -> Comparison:
        """Check every stated fact. What concerns a missing part neither holds nor fails."""
        missing = tuple(part for part in self.parts if part not in headers.parts)
        facts = [*self._stated(headers), *self._compared(headers, missing)]
        present = [part for part in self.parts if part not in missing]
        if present:
            facts.insert(0, (True, f"{', '.join(present)} in model_index.json"))
        return Comparison(
            holds=tuple(words for holds, words in facts if holds and words),
            fails=tuple(words for holds, words in facts if not holds),
            missing=missing,
        )

    def evidence(self, headers: Headers) -> str | None:
        """The facts, in words, if all of them hold."""
        found = self.compare(headers)
        return None if found.fails or found.missing else ", ".join(found.holds)

    def _stated(self, headers: Headers) -> Iterator[tuple[bool, str]]:
        if self.lone:
            yield not headers.pipeline, "" if not headers.pipeline else f"it is a {headers.pipeline}"
        if self.classes:
            found = next((name for name in headers.classes() if re.fullmatch(self.classes, name)), None)
            yield found is not None, f"class {found}" if found else f"no class like {self.classes}"
        for pattern in self.tensors:
            name = headers.tensor(pattern)
            yield name is not None, f"tensor {name}" if name else f"no tensor like {pattern}"

    def _compared(self, headers: Headers, missing: tuple[str, ...]) -> Iterator[tuple[bool, str]]:
        def is_known(*paths: str) -> bool:
            return not any(path.partition(".")[0] in missing for path in paths)

        for path, fitting in self.settings.items():
            if is_known(path):
                value = headers.setting(path)
                # that a key may also be absent is no evidence worth telling
                words = "" if None in fitting else f"{path} = {value!r}"
                yield (True, words) if value in fitting else (False, f"{path} = {value!r}")
        for path in self.given:
            if is_known(path):
                value = headers.setting(path)
                yield value is not None, f"{path} = {value!r}"
        for one, other in self.equal:
            if is_known(one, other):
                a, b = headers.setting(one), headers.setting(other)
                yield (True, f"{one} = {other} = {a!r}") if a == b else (False, f"{one} = {a!r}, {other} = {b!r}")


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

    def unused(self, config: Mapping[str, Any]) -> str:
        """Regular expression of tensors that a checkpoint stores and nothing computes with."""
        if config.get(STATES) != PENULTIMATE or "CLIPTextModel" not in self.classes:
            return r"(?!)"
        return rf"^(encoder\.layers\.{int(config['num_hidden_layers']) - 1}|final_layer_norm)\."


@dataclass(frozen=True, slots=True)
class Family:
    """Checkpoints that share an architecture and are converted alike."""

    name: str
    title: str
    components: Mapping[str, Part]  # of every checkpoint
    signature: Signature
    guidance: float  # what diffusers' pipeline of the family guides with where nobody says otherwise
    lcm_guidance: float = 8.5  # of a latent consistency model: LatentConsistencyModelPipeline's default
    prediction: str | None = "epsilon"  # what its denoiser predicts where nothing states it; None: it must be stated
    pipeline: str = "StableDiffusionPipeline"  # diffusers' class that draws with it: the reference
    additions: Mapping[str, Part] = field(default_factory=dict)  # components that may be given beside a checkpoint

    def part(self, component: str) -> Part:
        """How a component is stored."""
        return self.components[component] if component in self.components else self.additions[component]

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
