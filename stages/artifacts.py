"""What flows through a conversion: pointers to files, and facts about them. Never weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

Role = Literal["text", "denoiser", "decoder", "encoder", "control"]

ROLES: Final[Mapping[str, Role]] = {
    "text_encoder": "text",
    "text_encoder_2": "text",
    "unet": "denoiser",
    "vae_decoder": "decoder",
    "vae_encoder": "encoder",
    "controlnet": "control",
}
"""Component -> what it is for, in the order of conversion. A family with another denoiser or encoder adds a line."""


def role_of(component: str) -> Role:
    """What `component` is for. Several may share a role; of a denoiser, decoder and encoder a checkpoint has one."""
    return ROLES[component]


def with_role(role: Role, components: Iterable[str]) -> tuple[str, ...]:
    """Those of `components` that are for `role`, in their order."""
    return tuple(name for name in components if ROLES.get(name) == role)


def sole(role: Role, components: Iterable[str]) -> str:
    """The one of `components` that is for `role`.

    Raises:
        ValueError: there is none, or there are several.
    """
    (name,) = with_role(role, components)
    return name


PIPELINE_SETTINGS: Final = ("force_zeros_for_empty_prompt",)
"""Entries of model_index.json that decide what is drawn."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, numpy dtype name and static shape of one input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies in its file, and what its bytes mean. A slice of rows is a tensor of its own."""

    file: Path
    name: str
    dtype: str  # "float32", "bfloat16", ...: numpy's name, or that of ml_dtypes
    shape: tuple[int, ...]  # as stored
    start: int  # first byte, from the beginning of the file
    bytes: int
    transposed: bool = False  # a matrix that is read with its axes swapped


@dataclass(frozen=True, slots=True)
class Adapted:
    """What one adapter does to one parameter; `export.adapters.merge` does it whenever the parameter is read."""

    parameter: str  # of the component's state_dict
    kind: str  # lora (with or without DoRA's magnitudes), loha, lokr, oft, boft, lycoris-oft, full, rows (appended)
    roles: tuple[str, ...]  # what each of `factors` is: down, up, alpha, hada_w1_a, ...
    factors: tuple[StoredTensor, ...]
    settings: Mapping[str, Any]  # PEFT's, as far as they decide the arithmetic
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """One adapter that is merged into a checkpoint."""

    label: str  # file name, below its folder if that was given
    place: str  # label of its weights in `Checkpoint.places`
    scale: float
    parameters: Mapping[str, int]  # component -> how many of its parameters it changes
    distilled: str = ""  # "lcm": the checkpoint becomes a latent consistency model
    words: tuple[str, ...] = ()  # tokens that a textual inversion adds, in the order of their ids
    idle: int = 0  # modules of layers that the checkpoint holds and nothing computes with


@dataclass(frozen=True, slots=True)
class Companions:
    """What was given beside a checkpoint and decides the result: what single files lack, and what is merged in."""

    vae: Path | None = None  # a VAE apart: folder or file, with today's names or those of the original code
    vae_decoder: Path | None = None  # folder of a tiny decoder, in place of the VAE's
    controlnet: Path | None = None  # folder or file
    tokenizer: Path | None = None  # folder
    config: Path | None = None  # folder of diffusers configurations, or a YAML of the original code
    prediction: str | None = None  # "epsilon" or "v_prediction"
    ema: bool = False  # take the averaged weights of a single file that holds both
    adapters: tuple[tuple[Path, float], ...] = ()  # files or folders with their scales, merged in this order


ALONE: Final = Companions()


@dataclass(frozen=True, slots=True)
class ComponentSource:
    """One component of a checkpoint: its configuration and where its weights lie.

    `digest` covers the configuration and the *content* of the weight files, so the same text encoder
    found in two folders is the same source.
    """

    component: str  # one of COMPONENTS
    family: str
    config: Mapping[str, Any]  # diffusers' or transformers' own config.json
    files: tuple[Path, ...]  # safetensors files; vae_decoder and vae_encoder share theirs
    digest: str  # sha256, hex
    parameters: int
    dtype: str  # as stored: float32, float16, bfloat16
    tensors: tuple[StoredTensor, ...] = ()  # under today's names, where `files` store other names; else empty
    adapted: tuple[Adapted, ...] = ()  # changes of parameters, in the order in which they are merged


GuidanceMode = Literal["cfg", "embedded", "none"]


@dataclass(frozen=True, slots=True)
class Variant:
    """How a checkpoint wants to be sampled, and the evidence for it."""

    name: str  # for people; "base" when nothing was distilled
    why: str
    guidance_mode: GuidanceMode
    guidance: float
    steps: int
    recipe: str  # the shipped recipe that fits
    prediction_type: str
    prediction_why: str
    task: Literal["text-to-image", "inpainting"]
    input_channels: int  # of the UNet's `sample`

    @property
    def label(self) -> str:
        """One phrase for all of it."""
        return self.name if self.task == "text-to-image" else f"{self.name}, {self.task}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was recognised from its headers."""

    name: str
    root: Path  # the folder, or the single file
    family: str
    why: str  # the evidence for `family`, for people
    components: Mapping[str, ComponentSource]
    scheduler: Mapping[str, Any]  # scheduler_config.json, `_class_name` included
    tokenizer: Path  # folder with tokenizer.json, or vocab.json and merges.txt
    sources: Mapping[
        str, str
    ]  # label -> sha256 of every file that decides the result; a path below root, if it is there
    digest: str
    variant: Variant
    places: Mapping[str, Path] = field(default_factory=dict)  # label -> where that file lies on this machine
    companions: Companions = ALONE
    adapters: tuple[AdapterSource, ...] = ()
    remarks: tuple[str, ...] = ()  # what is assumed because no file states it, for people
    tokenizer_2: Path | None = None  # of the second text encoder
    pipeline: str = ""  # diffusers' class that the checkpoint names; "" where it names none
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the pipeline: keys of PIPELINE_SETTINGS

    @property
    def words(self) -> tuple[str, ...]:
        """Tokens that adapters add to every tokenizer, in the order of their ids, which follow all others."""
        return tuple(word for adapter in self.adapters for word in adapter.words)

    @property
    def denoiser(self) -> ComponentSource:
        """What predicts noise (or velocity) in latents."""
        return self.components[sole("denoiser", self.components)]

    @property
    def decoder(self) -> ComponentSource:
        """What turns latents into a picture."""
        return self.components[sole("decoder", self.components)]

    @property
    def vae_scale(self) -> int:
        """Pixels a latent along one side (8 for every published Stable Diffusion VAE)."""
        levels: int = len(self.decoder.config["block_out_channels"])
        return int(2 ** (levels - 1))


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """A component as ONNX: `model.onnx` and, for large weights, `model.onnx_data` beside it."""

    folder: Path
    component: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    digest: str = ""

    @property
    def file(self) -> Path:
        return self.folder / "model.onnx"


@dataclass(frozen=True, slots=True)
class TargetModel:
    """A component in the form that one runtime loads.

    `files` are paths below `folder`, the one to load first. `inputs` and `outputs` are what the native
    model takes: they may differ from PyTorch's (ncnn and MNN take a ready-made timestep embedding).
    `forms` maps the name of an alternative form (ORT's mobile `ort`) to its own files.
    """

    folder: Path
    component: str
    target: str
    precision: str
    files: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    bits_per_weight: float
    forms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what the user should know, e.g. why a form is absent
    digest: str = ""
