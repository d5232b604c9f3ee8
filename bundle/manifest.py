"""manifest.json, schema 2: all that an app has to know about a bundle. docs/bundle.md is for its readers.

Strict both ways: an unknown key, a wrong type, a path that could leave the folder, or a number that JSON cannot say
is an error. Serialisation is canonical, so equal manifests are equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from ..stages.artifacts import with_role
from ..stages.errors import BundleError
from ..stages.strict import Location, Strict, parsed
from .manifest_arithmetic import ArithmeticEntry
from .manifest_entries import (
    ComponentEntry,
    ComponentName,
    ConditioningEntry,
    ControlEntry,
    FileEntry,
    GuidanceEntry,
    MemoryEntry,
    ParityEntry,
    Provenance,
    ScheduleEntry,
    Size,
    SpeedEntry,
    TargetEntry,
    TimeEmbedding,
    TokenizerEntry,
    VaeEntry,
)

SCHEMA: Final = 2
OLDEST: Final = 1
"""2 states `arithmetic`; a bundle of schema 1 says nothing about it, and is read as before."""
MANIFEST: Final = "manifest.json"
MAX_BYTES: Final = 8 * 2**20
"""A manifest of the demo has some 30 kB; megabytes are an attack or a mistake."""

_HINT: Final = "convert the checkpoint again, or copy the bundle again from an intact copy"


Gate = Literal["passed", "failed", "skipped by --no-gate"]


class Manifest(Strict):
    """manifest.json as a whole. `assets` are the files that no other entry names."""

    schema_: Annotated[int, Field(ge=OLDEST, le=SCHEMA)] = Field(default=SCHEMA, alias="schema")  # true equals 1
    name: Annotated[str, Field(min_length=1)]
    family: str
    target: TargetEntry
    components: Annotated[dict[ComponentName, ComponentEntry], Field(min_length=1)]
    tokenizer: TokenizerEntry
    tokenizer_2: TokenizerEntry | None = None
    schedule: ScheduleEntry
    guidance: GuidanceEntry
    conditioning: ConditioningEntry
    control: ControlEntry | None = None
    vae: VaeEntry
    time_embedding: TimeEmbedding
    size: tuple[Size, Size]  # height, width in pixels
    recipe: str
    provenance: Provenance
    parity: dict[ComponentName, ParityEntry] = Field(default_factory=dict)
    speed: dict[ComponentName, SpeedEntry] = Field(default_factory=dict)
    memory: MemoryEntry = MemoryEntry()
    gate: Gate
    arithmetic: ArithmeticEntry | None = None  # absent in bundles of schema 1
    assets: tuple[FileEntry, ...] = ()

    def files(self) -> Iterator[FileEntry]:
        """Every declared file; one that two forms share comes twice."""
        for component in self.components.values():
            yield from component.files
            for form in component.forms.values():
                yield from form
        yield from self.tokenizer.files
        yield from self.tokenizer_2.files if self.tokenizer_2 else ()
        yield from (other.file for other in self.schedule.others)
        yield from self.assets

    @model_validator(mode="after")
    def _agree(self) -> Manifest:
        seen: dict[str, FileEntry] = {}
        for file in self.files():
            known = seen.setdefault(file.path.casefold(), file)
            if known != file:
                raise PydanticCustomError("twice", "{path} is declared twice, differently", {"path": repr(file.path)})
            if file.path.casefold() == MANIFEST:
                raise PydanticCustomError("itself", "manifest.json declares itself")
        if (self.tokenizer_2 is not None) != (self.conditioning.text_encoders == 2):
            raise PydanticCustomError("encoders", "a second text encoder and its tokenizer go together")
        self._controls()
        if self.arithmetic and self.arithmetic.proven_in.keys() != self.components.keys():
            raise PydanticCustomError("arithmetic", "arithmetic.proven_in does not name every component")
        for section in ("parity", "speed"):
            strangers = [name for name in getattr(self, section) if name not in self.components]
            if strangers:
                found = {"section": section, "names": ", ".join(strangers)}
                raise PydanticCustomError("stranger", "{section} speaks of {names}, which the bundle lacks", found)
        return self

    def _controls(self) -> None:
        """What a ControlNet gives must be what the UNet takes, by name and shape."""
        controls, denoisers = with_role("control", self.components), with_role("denoiser", self.components)
        if (self.control is not None) != bool(controls):
            raise PydanticCustomError("control", "a ControlNet and 'control' go together")
        if self.control is None:
            return
        given, taken = {}, {}
        for name in denoisers:
            given = {tensor.name: tensor.shape for tensor in self.components[controls[0]].outputs}
            taken = {tensor.name: tensor.shape for tensor in self.components[name].inputs}
        for one, other in self.control.residuals.items():
            if one not in given or given[one] != taken.get(other):
                found = {"one": repr(one), "other": repr(other)}
                raise PydanticCustomError("residual", "no {one} of the ControlNet fits a {other} of the UNet", found)

    def to_json(self) -> str:
        """Canonical text: keys sorted, two spaces, one newline at the end; the same manifest gives the same bytes."""
        plain = self.model_dump(mode="json", by_alias=True)
        return json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def parse_manifest(text: bytes, where: str = MANIFEST) -> Manifest:
    """Read a manifest; `where` names the file in errors.

    Raises:
        BundleError: it is too large, no JSON, says a thing twice, is of another schema, or breaks the schema.
    """
    if len(text) > MAX_BYTES:
        raise BundleError(f"{where}: {len(text)} bytes, at most {MAX_BYTES} are read", hint=_HINT)
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError: JSON's and UTF-8's errors, and numbers of 4,300 digits
        raise BundleError(f"{where}: no valid JSON: {error}", hint=_HINT) from None
    if not isinstance(data, dict):
        raise BundleError(f"{where}: no JSON object", hint=_HINT)
    schema = data.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise BundleError(
            f"{where}: schema {schema}: written by a newer diffusette; this one reads up to {SCHEMA}",
            hint="install a newer diffusette",
        )
    if "schema" not in data:
        raise BundleError(f"{where}: 'schema' is missing", hint="this is no diffusette bundle, or a damaged one")
    return parsed(Manifest, data, lambda place: _dotted(where, place), BundleError)


def schema_json() -> str:
    """The JSON Schema of manifest.json, for other programs and the docs."""
    return json.dumps(Manifest.model_json_schema(by_alias=True), sort_keys=True, indent=2) + "\n"


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return found


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _dotted(where: str, place: Location) -> str:
    """`manifest.json: components.unet.files[0]`"""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")
    return f"{where}: {path}" if path else where
