"""A ControlNet given beside a checkpoint: a diffusers folder, or one file with diffusers' names or the original ones.

"Adding Conditional Control to Text-to-Image Diffusion Models" (Zhang et al. 2023). It reads what the UNet reads and a
picture, and what it gives is added inside the UNet, so the two must agree in nearly all of their configuration. Whether
they do is told from headers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ..stages.artifacts import ComponentSource
from ..stages.errors import CheckpointError
from .config import architecture, layers_of, pixels_per_latent
from .diffusers_folder import INDEX, read_json
from .families import TEXT_WIDTHS, Part
from .families.family import TAKES_RESIDUALS
from .layout import PartWeights, read_parts
from .stored_file import read_stored
from .weight_files import find_weights

CLASS: Final = "ControlNetModel"
OPTION: Final = "--controlnet"
PREFIX: Final = "control_model."  # of the original code's ControlLDM
_HINT: Final = f"give a {CLASS} of diffusers (its folder), or a control_*.safetensors, for SD 1.x, 2.x or XL"

# Keys that ControlNetModel.from_unet takes over from the UNet, which a file without config.json leaves open.
_FROM_UNET: Final = (
    "act_fn", "addition_embed_type", "addition_time_embed_dim", "attention_head_dim", "block_out_channels",
    "cross_attention_dim", "down_block_types", "downsample_padding", "flip_sin_to_cos", "freq_shift",
    "layers_per_block", "mid_block_scale_factor", "norm_eps", "norm_num_groups", "num_attention_heads",
    "only_cross_attention", "projection_class_embeddings_input_dim", "resnet_time_scale_shift",
    "transformer_layers_per_block", "upcast_attention", "use_linear_projection",
)  # fmt: skip

# What must be equal: the width of the text, the shapes of what is added, and what the host computes once for both.
_ALIKE: Final = (
    "cross_attention_dim",
    "addition_embed_type",
    "block_out_channels",
    "layers_per_block",
    "projection_class_embeddings_input_dim",
    "addition_time_embed_dim",
    "flip_sin_to_cos",
    "freq_shift",
)
_USUAL: Final = {"flip_sin_to_cos": True, "freq_shift": 0}

# Settings with which a network is another one than those that are run here, and what people call it then.
_SPECIAL: Final[tuple[tuple[str, tuple[Any, ...], str], ...]] = (
    (
        "global_pool_conditions",
        (None, False),
        "it pools what it adds (shuffle), for which pipelines guide in another way",
    ),
    ("controlnet_conditioning_channel_order", (None, "rgb"), "it takes pictures as BGR"),
    ("conditioning_channels", (None, 3), "it takes no RGB picture"),
    ("class_embed_type", (None,), "it reads a class"),
    ("encoder_hid_dim_type", (None,), "it projects the text"),
)

# Other networks that are handed in as a ControlNet, by a tensor that only they have.
_STRANGERS: Final = (
    (r"^lllite_", "a ControlNet-LLLite"),
    (r"^lora_controlnet$", "a Control-LoRA, which holds only a part of a ControlNet's weights"),
    (r"^(task_embedding$|control_add_embedding\.)", "a ControlNet Union, which takes several pictures"),
    (r"^difference$", "the difference of a ControlNet to its base"),
    (
        r"(^|\.)(double_blocks|transformer_blocks|joint_blocks)\.\d+\.(img_|attn\.(to_q|qkv)|x_block)",
        "for a transformer",
    ),
    (r"^(adapter\.)?body\.\d+\.", "a T2I-Adapter"),
    (r"(^|[._])lora_?([AB]|up|down)([._]|$)", "a LoRA, which is given with --adapter"),
    (r"^model\.diffusion_model\.", "a checkpoint without a ControlNet in it"),
)

Given = tuple[dict[str, Any], PartWeights, Mapping[str, Path], tuple[str, ...]]


def read_controlnet(place: Path, unet: ComponentSource, part: Part) -> Given:
    """Configuration, weights, files by label, and what is assumed, of the ControlNet at `place`.

    Args:
        unet: the UNet that it is to steer.
        part: how a ControlNet is stored.
    Raises:
        CheckpointError: it holds another model, or one for another UNet.
    """
    if place.is_dir():
        found = _read_folder(place, part)
        _refuse_other(found[0], unet.config, place)
    else:
        found = _read_file(place, unet, part)
        _refuse_other(found[0], unet.config, place)
        _refuse_misfits(found[1], replace(unet, component="controlnet", config=found[0]), place)
    return found


def taking_residuals(unet: ComponentSource) -> ComponentSource:
    """`unet` with inputs for what a ControlNet adds."""
    return replace(unet, config={**unet.config, TAKES_RESIDUALS: True})


def _read_folder(place: Path, part: Part) -> Given:
    folder = place / part.folder if (place / INDEX).is_file() else place
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{OPTION} {place}: no config.json in it", hint=f"give the folder of a {CLASS}, or a file"
        )
    raw = read_json(file)
    if raw.get("_class_name") != CLASS:
        raise CheckpointError(f"{OPTION} {place}: is {raw.get('_class_name')!r}, not {CLASS!r}", hint=_HINT)
    for key, kind in part.required.items():
        if not isinstance(raw.get(key), kind):
            raise CheckpointError(f"{file}: {key!r} is {raw.get(key)!r}, a {kind.__name__} is needed", hint=_HINT)
    if not isinstance(raw.get("layers_per_block", 2), int | list):
        raise CheckpointError(
            f"{file}: 'layers_per_block' is {raw['layers_per_block']!r}, a number of layers is needed", hint=_HINT
        )
    found = find_weights(folder)
    places = {f"controlnet/{each.name}": each for each in (file, *found.places)}
    return {**part.defaults, **architecture(raw)}, read_parts(found.files), places, ()


def _read_file(place: Path, unet: ComponentSource, part: Part) -> Given:
    """A lone file says nothing but names and shapes: the rest is the UNet's, as diffusers makes a ControlNet of one."""
    from .single_file.names import controlnet_names

    stored = read_stored(place)[0]
    below = {name: tensor for name, tensor in stored.items() if name.startswith(PREFIX)} or stored
    bare = {name.removeprefix(PREFIX) for name in below}
    if not any(name.startswith(("input_hint_block.0.", "controlnet_cond_embedding.conv_in.")) for name in bare):
        for pattern, what in _STRANGERS:
            if any(re.search(pattern, name) for name in stored):
                raise CheckpointError(f"{OPTION} {place}: {what}", hint=_HINT)
        raise CheckpointError(f"{OPTION} {place}: no tensor of a ControlNet in it", hint=_HINT)
    for pattern, what in _STRANGERS[:4]:
        if any(re.search(pattern, name) for name in bare):
            raise CheckpointError(f"{OPTION} {place}: {what}", hint=_HINT)
    context = next((tensor.shape[-1] for name, tensor in below.items() if name.endswith("attn2.to_k.weight")), None)
    if context is not None:  # another family's, which is told before anything slow is loaded
        _refuse_unlike("cross_attention_dim", {"cross_attention_dim": context}, unet.config, place)
    config = {**part.defaults, **{key: unet.config[key] for key in _FROM_UNET if key in unet.config}}
    tensors = controlnet_names(below, layers=_layers(config, place))
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    config |= _told_by(shapes, place)
    remark = f"{place.name} states no configuration: that of the UNet, as ControlNetModel.from_unet takes it"
    return config, PartWeights((place,), tensors, renamed=True), {f"controlnet/{place.name}": place}, (remark,)


def _layers(config: Mapping[str, Any], place: Path) -> int:
    layers = set(layers_of(config))
    if len(layers) > 1:
        raise CheckpointError(
            f"{OPTION} {place}: the UNet's levels have {config['layers_per_block']} layers", hint=_HINT
        )
    return layers.pop()


def _told_by(shapes: Mapping[str, tuple[int, ...]], place: Path) -> dict[str, Any]:
    """The settings that shapes do tell: those in which ControlNets differ, and those that give a stranger away."""
    blocks = sum(bool(re.fullmatch(r"controlnet_cond_embedding\.blocks\.\d+\.weight", name)) for name in shapes)
    try:
        width, channels = shapes["controlnet_cond_embedding.conv_in.weight"][:2]
        widths = [shapes[f"controlnet_cond_embedding.blocks.{index}.weight"][0] for index in range(1, blocks, 2)]
        return {
            "_class_name": CLASS,
            "in_channels": shapes["conv_in.weight"][1],
            "conditioning_channels": channels,
            "conditioning_embedding_out_channels": [width, *widths],
            "cross_attention_dim": next(s[1] for name, s in shapes.items() if name.endswith("attn2.to_k.weight")),
            "addition_embed_type": "text_time" if "add_embedding.linear_1.weight" in shapes else None,
        }
    except (KeyError, IndexError, ValueError, StopIteration):
        raise CheckpointError(
            f"{OPTION} {place}: a part of the ControlNet is missing", hint="download the file again"
        ) from None


def _refuse_other(config: Mapping[str, Any], unet: Mapping[str, Any], place: Path) -> None:
    for key, usual, why in _SPECIAL:
        if config.get(key) not in usual:
            raise CheckpointError(
                f"{OPTION} {place}: {why} ({key} = {config[key]!r})", hint="it cannot be converted yet"
            )
    for key in _ALIKE:
        _refuse_unlike(key, config, unet, place)
    if config["in_channels"] != unet["out_channels"]:
        raise CheckpointError(
            f"{OPTION} {place}: takes latents of {config['in_channels']} channels, the UNet draws "
            f"{unet['out_channels']}",
            hint="it was made for another UNet",
        )
    widths = config["conditioning_embedding_out_channels"]
    pixels = pixels_per_latent(unet)
    if not isinstance(widths, list) or 2 ** (len(widths) - 1) != pixels:
        raise CheckpointError(
            f"{OPTION} {place}: conditioning_embedding_out_channels = {widths!r}: it does not bring a picture to the "
            f"size of latents, one for {pixels} pixels",
            hint="it cannot be converted yet",
        )


def _refuse_unlike(key: str, config: Mapping[str, Any], unet: Mapping[str, Any], place: Path) -> None:
    own, other = (_plain(key, each) for each in (config, unet))
    if own != other:
        name = TEXT_WIDTHS.get(own) if key == "cross_attention_dim" else None
        hint = f"it was made for {name or 'another UNet'}"
        raise CheckpointError(f"{OPTION} {place}: {key} is {own!r}, that of the UNet is {other!r}", hint=hint)


def _plain(key: str, config: Mapping[str, Any]) -> Any:
    if key == "layers_per_block":
        return layers_of(config)
    value = config.get(key)
    return _USUAL.get(key) if value is None else value


def _refuse_misfits(weights: PartWeights, source: ComponentSource, place: Path) -> None:
    """Compare every tensor with the network that the configuration describes, which costs no weights."""
    from .network import build

    shapes = {tensor.name: tensor.shape for tensor in weights.tensors}
    wanted = {name: tuple(parameter.shape) for name, parameter in build(source).named_parameters()}
    wrong = {
        "missing": sorted(wanted.keys() - shapes.keys()),
        "without a place": sorted(shapes.keys() - wanted.keys()),
        "of another shape": sorted(name for name in wanted if shapes.get(name, wanted[name]) != wanted[name]),
    }
    told = [f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in wrong.items() if names]
    if told:
        raise CheckpointError(
            f"{OPTION} {place}: not a ControlNet of this UNet: tensors {'; '.join(told)}",
            hint="it was made for another UNet, or has a configuration of its own: give its diffusers folder",
        )
