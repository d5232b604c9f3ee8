"""What each component takes and gives: names, dtypes and static shapes, without building anything.

The names are optimum's where it has one, else diffusers' own; docs/architecture.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..checkpoints.config import layers_of, pixels_per_latent, vae_pixels_per_latent
from ..checkpoints.families.family import PENULTIMATE, STATES, TAKES_RESIDUALS
from ..stages.artifacts import ComponentSource, TensorSpec, role_of

TIME_IDS: Final = 6  # SDXL: original height and width, crop's top and left, target height and width
MAX_TOKENS: Final = 77  # CLIP's context, "Learning Transferable Visual Models" (Radford et al. 2021)

CONTROL_PICTURE: Final = "controlnet_cond"  # [1, 3, H, W] in 0..1: ControlNetModel.forward's name
# UNet2DConditionModel.forward's and ControlNetOutput's names, numbered where they are lists
RESIDUALS_IN: Final = ("down_block_additional_residuals", "mid_block_additional_residual")
RESIDUALS_OUT: Final = ("down_block_res_samples", "mid_block_res_sample")


def input_specs(source: ComponentSource, size: tuple[int, int]) -> tuple[TensorSpec, ...]:
    """Inputs of the wrapped module for pictures of `size` = (height, width) pixels."""
    config = source.config
    role = role_of(source.component)
    if role == "text":
        return (TensorSpec("input_ids", "int64", (1, MAX_TOKENS)),)
    if role in ("denoiser", "control"):
        return _unet_inputs(source, size)
    if role == "decoder":
        shape = (1, config["latent_channels"], *_vae_latents(config, size))
        return (TensorSpec("latent_sample", "float32", shape),)
    return (TensorSpec("sample", "float32", (1, config["in_channels"], *size)),)


def _unet_inputs(source: ComponentSource, size: tuple[int, int]) -> tuple[TensorSpec, ...]:
    """Of the UNet, and of the ControlNet, which begins as a UNet does."""
    config = source.config
    h, w = _latents(config, size)
    specs = [
        TensorSpec("sample", "float32", (1, config["in_channels"], h, w)),
        TensorSpec("timestep", "float32", ()),
        TensorSpec("encoder_hidden_states", "float32", (1, MAX_TOKENS, config["cross_attention_dim"])),
    ]
    if role_of(source.component) == "control":
        specs.append(TensorSpec(CONTROL_PICTURE, "float32", (1, config["conditioning_channels"], *size)))
    elif (width := config.get("time_cond_proj_dim")) is not None:
        specs.append(TensorSpec("timestep_cond", "float32", (1, width)))
    if config.get("addition_embed_type") == "text_time":
        time_width = TIME_IDS * config["addition_time_embed_dim"]
        pooled = config["projection_class_embeddings_input_dim"] - time_width
        specs.append(TensorSpec("text_embeds", "float32", (1, pooled)))
        specs.append(TensorSpec("time_ids", "float32", (1, TIME_IDS)))
    if config.get(TAKES_RESIDUALS):
        specs += _residuals(config, size, RESIDUALS_IN)
    return tuple(specs)


def _latents(config: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the latents of pictures of `size` = (height, width) pixels, beside a UNet or ControlNet."""
    return size[0] // pixels_per_latent(config), size[1] // pixels_per_latent(config)


def _vae_latents(config: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, int]:
    """The same, of half a VAE."""
    return size[0] // vae_pixels_per_latent(config), size[1] // vae_pixels_per_latent(config)


def _residuals(config: Mapping[str, Any], size: tuple[int, int], names: tuple[str, str]) -> list[TensorSpec]:
    """What a ControlNet adds to what a UNet's down blocks hand to its up blocks, and to its middle."""
    channels, layers = config["block_out_channels"], layers_of(config)
    h, w = _latents(config, size)
    shapes = [(channels[0], h, w)]
    for level, (width, count) in enumerate(zip(channels, layers, strict=True)):
        shapes += [(width, h, w)] * count
        if level < len(channels) - 1:
            h, w = -(-h // 2), -(-w // 2)  # a convolution of stride 2 that pads
            shapes.append((width, h, w))
    down = [TensorSpec(f"{names[0]}_{index}", "float32", (1, *shape)) for index, shape in enumerate(shapes)]
    return [*down, TensorSpec(names[1], "float32", (1, channels[-1], h, w))]


def residual_inputs(outputs: tuple[str, ...]) -> dict[str, str]:
    """Output of a ControlNet -> the UNet's input that takes it."""
    given, taken = RESIDUALS_OUT, RESIDUALS_IN
    return {name: name.replace(given[0], taken[0]).replace(given[1], taken[1]) for name in outputs}


def output_specs(source: ComponentSource, size: tuple[int, int]) -> tuple[TensorSpec, ...]:
    """Outputs of the wrapped module for pictures of `size` = (height, width) pixels."""
    config = source.config
    role = role_of(source.component)
    if role == "text":
        name = "penultimate_hidden_state" if config.get(STATES) == PENULTIMATE else "last_hidden_state"
        states = TensorSpec(name, "float32", (1, MAX_TOKENS, config["hidden_size"]))
        if source.component == "text_encoder":
            return (states,)
        return states, TensorSpec("text_embeds", "float32", (1, config["projection_dim"]))
    if role == "denoiser":
        return (TensorSpec("out_sample", "float32", (1, config["out_channels"], *_latents(config, size))),)
    if role == "control":
        return tuple(_residuals(config, size, RESIDUALS_OUT))
    if role == "decoder":
        return (TensorSpec("sample", "float32", (1, config["out_channels"], *size)),)
    shape = (1, 2 * config["latent_channels"], *_vae_latents(config, size))
    return (TensorSpec("latent_parameters", "float32", shape),)
