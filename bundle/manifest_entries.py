"""The entries of a manifest: what it says of files, tensors, components, and how a picture is drawn with them.

Values are bounded and rounded here, so that equal inputs give equal manifests; how the entries hang together is said
in `manifest.py`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue
from pydantic_core import PydanticCustomError

from ..stages.artifacts import ROLES, TensorSpec
from ..stages.safe_path import inside
from ..stages.strict import Strict

MAX_VALUES: Final = 2**31
"""Of one input or output."""

EXACT_DB: Final = 999.0
"""Stands for an infinite ratio, since JSON has no infinity: the two tensors are equal to the last bit. Programs can
still compare it with a floor. Unequal float32 tensors of a model stay below 300 dB."""


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


def _known_component(name: str) -> str:
    if name not in ROLES:
        known = {"known": ", ".join(ROLES)}
        raise PydanticCustomError("component", "should be a component: {known}", known)
    return name


# Numbers have upper bounds, since programs allocate by them; what people make stays far below.
Bytes = Annotated[int, Field(ge=0, le=2**43)]  # 8 TiB
Size = Annotated[int, Field(gt=0, le=2**20)]
Shape = Annotated[tuple[Annotated[int, Field(gt=0, le=MAX_VALUES)], ...], Field(max_length=8), AfterValidator(_bounded)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]  # int32, which ncnn and MNN take
Decibels = Annotated[float, BeforeValidator(_tenths), BeforeValidator(_finite_decibels)]
Positive = Annotated[float, Field(gt=0.0)]
ComponentName = Annotated[str, AfterValidator(_known_component)]


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
    """How the weights are stored (quantize/plan.py): a default, and exceptions by parameter.

    `channels`: groups of weights hold a multiple of so many whole input channels; 0: as the scheme's name says.
    """

    default: str
    exceptions: dict[str, str] = Field(default_factory=dict)
    channels: Annotated[int, Field(ge=0)] = 0


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
    """Compiled schedules (export/compiled_schedule.py): the default in place, others in files."""

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
