"""Names of the original latent-diffusion code -> today's, by running diffusers' own converters over headers.

The converters of `diffusers.loaders.single_file_utils` move tensors between dictionaries, slice OpenCLIP's stacked
q, k and v, and transpose its projection. Given stand-ins that only know where their bytes lie, they yield the same
map without reading a weight: a slice of rows is the same file at another offset.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Final

from ...stages.artifacts import StoredTensor
from ...stages.errors import CheckpointError

UNET: Final = "model.diffusion_model."
EMA: Final = "model_ema."
CLIP_PREFIXES: Final = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
OPEN_CLIP_PREFIXES: Final = ("cond_stage_model.model.", "conditioner.embedders.1.model.")
VAE_PREFIXES: Final = ("first_stage_model.", "vae.")
# the guidance scale's projection of latent consistency models, which diffusers' converter does not know
_CONDITION: Final = (f"{UNET}time_embed.cond_proj.weight", "time_embedding.cond_proj.weight")

Tensors = Mapping[str, StoredTensor]


class _Stand:
    """A tensor that knows its bytes' place and answers what the converters ask of a torch.Tensor."""

    def __init__(self, tensor: StoredTensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[::-1] if self.tensor.transposed else self.tensor.shape

    @property
    def ndim(self) -> int:
        return len(self.tensor.shape)

    @property
    def T(self) -> _Stand:
        return _Stand(replace(self.tensor, transposed=not self.tensor.transposed))

    def contiguous(self) -> _Stand:
        return self

    clone = detach = contiguous

    def __getitem__(self, index: Any) -> _Stand:
        """Rows `[a:b]`, or a 1x1 kernel without its axes: `[:, :, 0, 0]`."""
        axes = index if isinstance(index, tuple) else (index,)
        shape, rows = list(self.tensor.shape), axes[0]
        if self.tensor.transposed or not isinstance(rows, slice) or rows.step is not None:
            raise NotImplementedError(f"{index} of {self.tensor.name}")
        first, last, _ = rows.indices(shape[0])
        row = self.tensor.bytes // shape[0]
        kept = [last - first]
        for size, axis in zip(shape[1:], (*axes[1:], *[slice(None)] * (len(shape) - len(axes))), strict=True):
            if axis == slice(None):
                kept.append(size)
            elif axis != 0 or size != 1:
                raise NotImplementedError(f"{index} of {self.tensor.name}")
        start, length = self.tensor.start + first * row, (last - first) * row
        return _Stand(replace(self.tensor, shape=tuple(kept), start=start, bytes=length))


def unet_names(stored: Tensors, config: Mapping[str, Any], *, ema: bool = False) -> tuple[StoredTensor, ...]:
    """The UNet's tensors under diffusers' names.

    Raises:
        CheckpointError: a tensor of the UNet has no place in diffusers' UNet, or the averaged weights are incomplete.
    """
    from diffusers.loaders import single_file_utils as diffusers

    convert: Any = diffusers.convert_ldm_unet_checkpoint
    own = {name: tensor for name, tensor in stored.items() if name.startswith(UNET)}
    if ema:
        own = {name: _averaged(name, stored) for name in own}
    condition = own.pop(_CONDITION[0], None)
    found = _run(lambda stands: convert(stands, dict(config)), own, "UNet")
    return found if condition is None else (*found, replace(condition, name=_CONDITION[1]))


def controlnet_names(stored: Tensors, layers: int) -> tuple[StoredTensor, ...]:
    """A ControlNet's tensors under diffusers' names; `stored` are nothing else, with the original prefix or without.

    Args:
        layers: residual layers of each level, by which the original code's flat list of blocks is divided.
    Raises:
        CheckpointError: a tensor has no place in diffusers' ControlNetModel.
    """
    prefix = "control_model." if any(name.startswith("control_model.") for name in stored) else ""
    own = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    if "controlnet_cond_embedding.conv_in.weight" in own:
        return tuple(replace(tensor, name=name) for name, tensor in own.items())
    from diffusers.loaders import single_file_utils as diffusers

    mapping: Any = diffusers.DIFFUSERS_TO_LDM_MAPPING
    convert_controlnet: Any = diffusers.convert_controlnet_checkpoint

    def convert(stands: dict[str, Any]) -> Any:
        # SDXL's embedding of sizes is what that converter leaves out
        sizes = mapping["unet"]["addition_embed_type"].items()
        added = {new: stands[old] for new, old in sizes if old in stands}
        return {**convert_controlnet(stands, {"layers_per_block": layers}), **added}

    return _run(convert, own, "ControlNet")


def vae_names(stored: Tensors, config: Mapping[str, Any]) -> tuple[StoredTensor, ...]:
    """The VAE's tensors under diffusers' names; `stored` may hold a whole checkpoint, or the VAE without prefix.

    Raises:
        CheckpointError: a tensor of the VAE has no place in diffusers' AutoencoderKL.
    """
    from diffusers.loaders import single_file_utils as diffusers

    convert: Any = diffusers.convert_ldm_vae_checkpoint
    own = vae_tensors(stored)
    return _run(lambda stands: convert(stands, dict(config)), own, "VAE")


def clip_names(stored: Tensors) -> tuple[StoredTensor, ...]:
    """The tensors of CLIP's text encoder (SD 1.x, and SDXL's first) under transformers' names."""
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint

    own = {name: tensor for name, tensor in stored.items() if name.startswith(CLIP_PREFIXES)}
    return _run(convert_ldm_clip_checkpoint, own, "text encoder")


def open_clip_names(stored: Tensors, prefix: str, layers: int, width: int) -> tuple[StoredTensor, ...]:
    """The tensors of OpenCLIP's text encoder under transformers' names; layers from `layers` on are left out.

    Args:
        prefix: one of OPEN_CLIP_PREFIXES.
        layers: how many the configuration has: SD 2.x reads the last but one, so its last is not part of the model.
        width: of the hidden states, which is where the stacked q, k and v are cut.
    """
    from diffusers.loaders import single_file_utils as diffusers

    convert: Any = diffusers.convert_open_clip_checkpoint

    def is_part(name: str) -> bool:
        block = name.removeprefix(f"{prefix}transformer.resblocks.").split(".")[0]
        return not block.isdigit() or int(block) < layers

    ignored = {f"{prefix}logit_scale", f"{prefix}attn_mask"}
    if prefix == OPEN_CLIP_PREFIXES[0]:  # SD 2.x has it and does not use it
        ignored.add(f"{prefix}text_projection")
    own = {
        name: tensor
        for name, tensor in stored.items()
        if name.startswith(prefix) and name not in ignored and is_part(name)
    }
    # the cut follows the projection's first axis where there is one: equal to the width in every known model
    projection = own.get(f"{prefix}text_projection")
    if projection is not None and projection.shape[0] != width:
        raise CheckpointError(
            f"{projection.file}: {projection.name!r} is {list(projection.shape)}, the text encoder is {width} wide",
            hint="the file mixes two models",
        )
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
    return _run(lambda stands: convert(model, stands, prefix=prefix), own, "text encoder")


def vae_tensors(stored: Tensors) -> dict[str, StoredTensor]:
    """The VAE's part of `stored`: of a whole checkpoint, or of a file that holds nothing but a VAE."""
    prefix = next((p for p in VAE_PREFIXES if any(name.startswith(p) for name in stored)), "")
    pattern = tuple(f"{prefix}{name}." for name in ("encoder", "decoder", "quant_conv", "post_quant_conv"))
    return {name: tensor for name, tensor in stored.items() if name.startswith(pattern)}


def _averaged(name: str, stored: Tensors) -> StoredTensor:
    flat = EMA + name.removeprefix("model.").replace(".", "")
    if flat not in stored:
        raise CheckpointError(
            f"{stored[name].file}: no averaged weights of {name!r} in it ({flat!r})", hint="leave --ema out"
        )
    return stored[flat]


def _run(convert: Any, own: Tensors, what: str) -> tuple[StoredTensor, ...]:
    """Convert stand-ins; every tensor of `own` must come out, whole."""
    converted: dict[str, _Stand | None]
    try:
        converted = convert({name: _Stand(tensor) for name, tensor in own.items()})
    except KeyError as missing:  # diffusers takes some names for granted
        raise CheckpointError(f"the {what} lacks {missing.args[0]!r}", hint="download the file again") from None
    by_name = {tensor.name: tensor for tensor in own.values()}
    lost = {name: tensor.bytes for name, tensor in by_name.items()}
    found = []
    for name, stand in converted.items():
        if stand is None:
            raise CheckpointError(f"the {what} lacks what diffusers calls {name!r}", hint="download the file again")
        found.append(replace(stand.tensor, name=name))
        lost[stand.tensor.name] -= stand.tensor.bytes  # a slice keeps the name of the whole until here
    left = [name for name, count in lost.items() if count]
    if left:
        file = by_name[left[0]].file
        raise CheckpointError(
            f"{file}: {len(left)} tensors of the {what} have no place in diffusers' model: {_first(left)}",
            hint="the file is of another architecture, or mixes several",
        )
    return tuple(found)


def _first(names: Iterable[str], count: int = 3) -> str:
    shown = list(names)
    return ", ".join(shown[:count]) + (", ..." if len(shown) > count else "")
