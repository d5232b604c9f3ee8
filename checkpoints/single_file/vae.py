"""A VAE given apart: a diffusers folder or file, or a file with the names of the original code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...stages.artifacts import sole
from ...stages.errors import CheckpointError
from ..config import vae_pixels_per_latent
from ..diffusers_folder import INDEX, read_json
from ..layout import Layout, PartWeights, read_parts
from ..pickled_file import is_pickled
from ..stored_file import read_stored
from ..weight_files import find_weights
from .names import VAE_PREFIXES, vae_names, vae_tensors
from .shapes import vae_config

_ORIGINAL = "encoder.down.0.block.0.norm1.weight"  # diffusers: encoder.down_blocks.0.resnets.0.norm1.weight
# what a file without config.json cannot say, taken from the VAE that it replaces
_INHERITED = ("scaling_factor", "shift_factor", "sample_size", "force_upcast")


Apart = tuple[dict[str, Any], PartWeights, dict[str, Path]]  # config.json, weights, places by label


def read_vae(place: Path, replaced: Mapping[str, Any]) -> Apart:
    """The VAE at `place`.

    Args:
        place: a folder of diffusers (the VAE's own, or a checkpoint's with vae/), or a safetensors file.
        replaced: configuration of the VAE that it replaces, as far as that is known.
    Raises:
        CheckpointError: it holds no VAE, one for other latents, or a lone file leaves open what only a configuration
            says.
    """
    found = _read(place, replaced)
    levels, own = found[0].get("block_out_channels"), replaced.get("block_out_channels")
    if levels and own and len(levels) != len(own):
        made, wanted = vae_pixels_per_latent(found[0]), vae_pixels_per_latent(replaced)
        raise CheckpointError(
            f"--vae {place}: {made} pixels a latent, the checkpoint's own VAE has {wanted}",
            hint="it is for another family",
        )
    return found


def _read(place: Path, replaced: Mapping[str, Any]) -> Apart:
    if place.is_dir():
        folder = place / "vae" if (place / INDEX).is_file() else place
        found = find_weights(folder)
        places = {f"vae/{file.name}": file for file in (*found.places, folder / "config.json")}
        return read_json(folder / "config.json"), read_parts(found.files), places
    stored = vae_tensors(read_stored(place)[0])
    if not stored:
        raise CheckpointError(f"--vae {place}: no tensor of a VAE in it", hint="give a VAE's folder or file")
    prefix = next((p for p in VAE_PREFIXES if any(name.startswith(p) for name in stored)), "")
    shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in stored.items()}
    places = {f"vae/{place.name}": place}
    if _ORIGINAL in shapes:
        inherited = {key: value for key, value in replaced.items() if key in _INHERITED}
        config = {**vae_config(shapes, str(place)), **inherited}
        return config, PartWeights((place,), vae_names(stored, config), renamed=True), places
    if "block_out_channels" not in replaced:
        raise CheckpointError(f"--vae {place}: a VAE without config.json", hint="give its folder")
    # the shapes are compared with the configuration when the model is built
    return dict(replaced), PartWeights((place,), tuple(stored.values()), renamed=is_pickled(place)), places


def with_vae(layout: Layout, place: Path) -> Layout:
    """`layout` with the VAE at `place` instead of its own.

    Raises:
        CheckpointError: as `read_vae`, or its latents are not those of the UNet.
    """
    config, weights, places = read_vae(place, layout.headers.configs.get("vae", {}))
    configs = layout.headers.configs
    wanted, found = configs[sole("denoiser", configs)].get("out_channels"), config.get("latent_channels")
    if found != wanted:
        raise CheckpointError(
            f"--vae {place}: latents of {found} channels, the UNet draws {wanted}", hint="it is for another family"
        )
    return layout.with_part("vae", config, weights, places)
