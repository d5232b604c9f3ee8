"""What a component's `config.json` says, for those who build nothing from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

PIXELS_PER_LATENT: Final = "diffusette_pixels_per_latent"
"""Entry that we add to the config of a UNet or a ControlNet whose VAE has other than `USUAL_PIXELS_PER_LATENT`."""

USUAL_PIXELS_PER_LATENT: Final = 8  # of every published Stable Diffusion VAE


def pixels_per_latent(config: Mapping[str, Any]) -> int:
    """Pixels a latent along one side, beside a UNet or a ControlNet of `config`."""
    return int(config.get(PIXELS_PER_LATENT, USUAL_PIXELS_PER_LATENT))


def vae_pixels_per_latent(config: Mapping[str, Any]) -> int:
    """Pixels a latent along one side, of a VAE or half of one: each of its levels but one halves a picture."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def with_pixels_per_latent(config: Mapping[str, Any], pixels: int) -> dict[str, Any]:
    """`config` of a UNet or a ControlNet beside a VAE of `pixels` a latent."""
    return {**config, PIXELS_PER_LATENT: pixels} if pixels != USUAL_PIXELS_PER_LATENT else dict(config)


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that decides what is computed: without provenance, and the dtype weights were saved in."""
    noise = {"_name_or_path", "_diffusers_version", "transformers_version", "dtype", "torch_dtype"}
    return {name: value for name, value in config.items() if name not in noise}


def layers_of(config: Mapping[str, Any]) -> list[int]:
    """Residual layers of each level of a UNet or a ControlNet; its config may say one number for all."""
    layers = config["layers_per_block"]
    return [layers] * len(config["block_out_channels"]) if isinstance(layers, int) else list(layers)
