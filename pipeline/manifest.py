"""manifest.json, schema 1: all that an app has to know about a bundle. docs/bundle.md is for its readers.

Strict both ways: an unknown key, a wrong type, a path that could leave the folder, or a number that JSON cannot say
is an error. Serialisation is canonical, so equal manifests are equal bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from .artifacts import TensorSpec
from .errors import BundleError
from .safe_path import inside
from .strict import Location, Strict, parsed

SCHEMA: Final = 1
MANIFEST: Final = "manifest.json"
MAX_BYTES: Final = 8 * 2**20
"""A manifest of the demo has some 30 kB; megabytes are an attack or a mistake."""

MAX_VALUES: Final = 2**31
"""Of one input or output."""

EXACT_DB: Final = 999.0
"""Stands for an infinite ratio, since JSON has no infinity: the two tensors are equal to the last bit. Programs can
still compare it with a floor. Unequal float32 tensors of a model stay below 300 dB."""

_HINT: Final = "convert the checkpoint again, or copy the bundle again from where it was whole"


def _finite_decibels(value: Any) -> Any:
    return math.copysign(EXACT_DB, value) if isinstance(value, float) and math.isinf(value) else value


def _tenths(value: Any) -> Any:
    """To 0.1 dB: further digits depend on the processor and its threads, and equal inputs must give equal bundles."""
    return round(value, 1) if isinstance(value, float) and math.isfinite(value) else value


def _two_digits(value: Any) -> Any:
    """To two significant digits, for the same reason."""
    return float(f"{value:.1e}") if isinstance(value, float) and math.isfinite(value) else value


def _bounded(shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(shape) > MAX_VALUES:
        found = {"values": math.prod(shape), "limit": MAX_VALUES}
        raise PydanticCustomError("large", "{values} values, a tensor has at most {limit}", found)
    return shape


RelativePath = Annotated[str, Field(min_length=1), AfterValidator(inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Numbers have upper bounds, since programs allocate by them; what people make stays far below.
Bytes = Annotated[int, Field(ge=0, le=2**43)]  # 8 TiB
Size = Annotated[int, Field(gt=0, le=2**20)]
Shape = Annotated[tuple[Annotated[int, Field(gt=0, le=MAX_VALUES)], ...], Field(max_length=8), AfterValidator(_bounded)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]  # int32, which ncnn and MNN take
Decibels = Annotated[float, BeforeValidator(_tenths), BeforeValidator(_finite_decibels)]
Positive = Annotated[float, Field(gt=0.0)]
ComponentName = Literal["text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder", "controlnet"]
Gate = Literal["passed", "failed", "skipped by --no-gate"]


class FileEntry(Strict):
    """One file of the bundle."""

    path: RelativePath
    sha256: Sha256
    bytes: Bytes


class TensorEntry(Strict):
    """One input or output: numpy's name of the dtype, static shape."""

    name: Annotated[str, Field(min_length=1)]
    dtype: Annotated[str, Field(pattern=r"^(float|u?int)(8|16|32|64)$|^bool$")]
    shape: Shape

    @classmethod
    def of(cls, spec: TensorSpec) -> TensorEntry:
        return cls(name=spec.name, dtype=spec.dtype, shape=spec.shape)

    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)


class TargetEntry(Strict):
    """The runtime that the models are for."""

    name: str
    version: str  # that built and proved them
    min_runtime: str  # oldest that loads them


class SchemeEntry(Strict):
    """A scheme's share of a component's parameters, and what it takes: bits a weight, scales included."""

    share: Annotated[float, Field(gt=0.0, le=1.0)]
    bits_per_weight: Positive


class PlanEntry(Strict):
    """How the weights are stored (quantize/plan.py): a default, and exceptions by parameter."""

    default: str
    exceptions: dict[str, str] = Field(default_factory=dict)


class ComponentEntry(Strict):
    """One model. `files`: the one to load first; `forms`: the same model in other forms of the runtime."""

    precision: str
    bits_per_weight: Positive
    plan: PlanEntry | None = None  # absent in bundles of earlier versions: all at `precision`
    schemes: dict[str, SchemeEntry] = Field(default_factory=dict)
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1)]
    inputs: Annotated[tuple[TensorEntry, ...], Field(min_length=1)]
    outputs: Annotated[tuple[TensorEntry, ...], Field(min_length=1)]
    forms: dict[str, Annotated[tuple[FileEntry, ...], Field(min_length=1)]] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()


class TokenizerEntry(Strict):
    """A prompt is `max_tokens` ids: `bos_id` first, then its own, `eos_id`, and `pad_id` to fill up."""

    kind: Literal["clip"]
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1)]
    max_tokens: Annotated[int, Field(gt=0, le=2**16)]
    pad_id: TokenId
    bos_id: TokenId
    eos_id: TokenId
    added_tokens: tuple[str, ...] = ()
    """Words of merged textual inversions, in the order of their ids; an app lets users type them."""


class OtherSchedule(Strict):
    """A further compiled schedule, in a file of its own."""

    name: str
    steps: Size
    path: RelativePath
    sha256: Sha256
    bytes: Bytes

    @property
    def file(self) -> FileEntry:
        return FileEntry(path=self.path, sha256=self.sha256, bytes=self.bytes)


class ScheduleEntry(Strict):
    """Compiled schedules (pipeline/schedule.py): the default in place, others in files."""

    default: dict[str, JsonValue]
    prediction_type: str
    timestep_spacing: str
    others: tuple[OtherSchedule, ...] = ()


class GuidanceEntry(Strict):
    """`cfg`: two UNet calls a step; `embedded`: the scale is an input; `none`: the model takes no guidance."""

    mode: Literal["cfg", "embedded", "none"]
    default: Annotated[float, Field(ge=0.0)]


class ConditioningEntry(Strict):
    """What the UNet reads beside latents, time and guidance.

    `text_encoders` stand side by side in `encoder_hidden_states`, the first encoder's states first. `zeros_for_empty`:
    an empty negative prompt is zeros, not the states of an empty text. `time_ids` [height, width, top, left, height,
    width] in pixels: SDXL only. `input_channels` of the UNet's `sample`: 4, or 9 with a mask and what is kept.
    """

    variant: str
    why: str
    text_encoders: Annotated[int, Field(ge=1, le=2)]
    zeros_for_empty: bool = False
    time_ids: bool = False
    input_channels: Annotated[int, Field(gt=0, le=64)]


class ControlEntry(Strict):
    """The bundle draws along a picture. `residuals`: output of the ControlNet -> the UNet's input that takes it, times
    the scale that the user chooses; `scale` is the usual one. Zeros there draw as without a ControlNet.
    """

    scale: Annotated[float, Field(ge=0.0)]
    residuals: Annotated[dict[str, str], Field(min_length=1)]


class VaeEntry(Strict):
    """Latents / `scaling_factor` + `shift` are what the decoder takes; what the encoder gives is brought back with
    `encoder_scaling_factor` and `encoder_shift`, which differ where a tiny decoder stands in.

    `force_upcast`: its activations exceed float16, so compute it in float32 whatever the phone prefers.
    """

    scaling_factor: Positive
    shift: float
    encoder_scaling_factor: Positive
    encoder_shift: float
    force_upcast: bool = False


class TimeEmbedding(Strict):
    """The sinusoid that ncnn and MNN models take in place of a timestep (diffusers' `Timesteps`)."""

    dim: Annotated[int, Field(gt=0, le=2**16, multiple_of=2)]
    flip_sin_to_cos: bool
    freq_shift: float
    max_period: Positive


class SourceEntry(Strict):
    """A file of the checkpoint, by its path below the checkpoint's folder."""

    file: RelativePath
    sha256: Sha256


class AdapterEntry(Strict):
    """A LoRA or the like that was merged into the weights."""

    file: RelativePath
    sha256: Sha256
    scale: float


class Provenance(Strict):
    """What the bundle was made from, and with which versions."""

    checkpoint: Sha256  # digest of the checkpoint as a whole, by which `validate` finds it again
    sources: Annotated[tuple[SourceEntry, ...], Field(min_length=1)]
    adapters: tuple[AdapterEntry, ...] = ()
    tools: dict[str, str]


class ParityEntry(Strict):
    """Worst distance from PyTorch in float32 over the gate's inputs, rounded; `max_abs` in the tensor's unit."""

    max_abs: Annotated[float, Field(ge=0.0), BeforeValidator(_two_digits)]
    snr_db: Decibels
    psnr_db: Decibels


class SpeedEntry(Strict):
    """Time of one call, divided by that of the same runtime's float32 model."""

    ratio_to_fp32: Positive
    forms: dict[str, Positive] = Field(default_factory=dict)  # of other forms, against float32 in the same form


class MemoryEntry(Strict):
    """Peak RSS in MiB of a process that loads and runs the component, by component."""

    forecast: dict[ComponentName, Positive] = Field(default_factory=dict)
    measured: dict[ComponentName, Positive] = Field(default_factory=dict)


class Manifest(Strict):
    """manifest.json as a whole. `assets` are the files that no other entry names."""

    schema_: Annotated[int, Field(ge=SCHEMA, le=SCHEMA)] = Field(default=SCHEMA, alias="schema")  # true equals 1
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
        for section in ("parity", "speed"):
            strangers = [name for name in getattr(self, section) if name not in self.components]
            if strangers:
                found = {"section": section, "names": ", ".join(strangers)}
                raise PydanticCustomError("stranger", "{section} speaks of {names}, which the bundle lacks", found)
        return self

    def _controls(self) -> None:
        """What a ControlNet gives must be what the UNet takes, by name and shape."""
        if (self.control is not None) != ("controlnet" in self.components):
            raise PydanticCustomError("control", "a ControlNet and 'control' go together")
        if self.control is None:
            return
        given, taken = {}, {}
        if "unet" in self.components:
            given = {tensor.name: tensor.shape for tensor in self.components["controlnet"].outputs}
            taken = {tensor.name: tensor.shape for tensor in self.components["unet"].inputs}
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
