"""What a component's `config.json` says, for those who build nothing from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

PIXELS_PER_LATENT: Final = 8  # of every Stable Diffusion VAE; a UNet's config does not tell


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that decides what is computed: without provenance, and the dtype weights were saved in."""
    noise = {"_name_or_path", "_diffusers_version", "transformers_version", "dtype", "torch_dtype"}
    return {name: value for name, value in config.items() if name not in noise}


def layers_of(config: Mapping[str, Any]) -> list[int]:
    """Residual layers of each level of a UNet or a ControlNet; its config may say one number for all."""
    layers = config["layers_per_block"]
    return [layers] * len(config["block_out_channels"]) if isinstance(layers, int) else list(layers)
