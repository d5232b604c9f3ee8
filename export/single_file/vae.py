"""A VAE given apart: a diffusers folder or file, or a file with the names of the original code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...pipeline.errors import CheckpointError
from ..diffusers_folder import INDEX, find_weights, read_json
from ..layout import Layout, PartWeights, read_parts
from ..safetensors_file import read_header
from .names import VAE_PREFIXES, vae_names, vae_tensors
from .shapes import vae_config

_ORIGINAL = "encoder.down.0.block.0.norm1.weight"  # diffusers: encoder.down_blocks.0.resnets.0.norm1.weight
# what a file without config.json cannot say, taken from the VAE that it replaces
_INHERITED = ("scaling_factor", "shift_factor", "sample_size", "force_upcast")


def with_vae(layout: Layout, place: Path) -> Layout:
    """`layout` with the VAE at `place`.

    Args:
        place: a folder of diffusers (the VAE's own, or a checkpoint's with vae/), or a safetensors file.
    Raises:
        CheckpointError: it holds no VAE, or one for latents of another kind.
    """
    if place.is_dir():
        folder = place / "vae" if (place / INDEX).is_file() else place
        files, index = find_weights(folder)
        config = read_json(folder / "config.json")
        weights = read_parts(files)
        places = {f"vae/{file.name}": file for file in (*files, *([index] if index else ()), folder / "config.json")}
        return _replaced(layout, config, weights, places, str(folder))
    stored = vae_tensors(read_header(place))
    if not stored:
        raise CheckpointError(f"--vae {place}: no tensor of a VAE in it", hint="give a VAE's folder or file")
    prefix = next((p for p in VAE_PREFIXES if any(name.startswith(p) for name in stored)), "")
    shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in stored.items()}
    inherited = {key: value for key, value in layout.headers.configs.get("vae", {}).items() if key in _INHERITED}
    if _ORIGINAL in shapes:
        config = {**vae_config(shapes, str(place)), **inherited}
        if "scaling_factor" not in config:
            raise CheckpointError(
                f"--vae {place}: nothing states the factor of its latents", hint="give a folder with config.json"
            )
        weights = PartWeights((place,), vae_names(stored, config), renamed=True)
    elif "vae" in layout.headers.configs:
        config = dict(layout.headers.configs["vae"])  # the shapes are compared with it when the model is built
        weights = PartWeights((place,), tuple(stored.values()))
    else:
        raise CheckpointError(f"--vae {place}: a VAE without config.json", hint="give its folder")
    return _replaced(layout, config, weights, {f"vae/{place.name}": place}, str(place))


def _replaced(
    layout: Layout, config: Mapping[str, Any], weights: PartWeights, places: Mapping[str, Path], where: str
) -> Layout:
    wanted, found = layout.headers.configs["unet"].get("in_channels"), config.get("latent_channels")
    if isinstance(wanted, int) and wanted == 4 and found != wanted:
        raise CheckpointError(
            f"--vae {where}: latents of {found} channels, the UNet takes {wanted}", hint="it is for another family"
        )
    return layout.with_part("vae", config, weights, places)
