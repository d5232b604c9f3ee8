"""A tiny decoder in place of the VAE's own: TAESD and TAEXL, a hundredth of its size and time.

https://github.com/madebyollin/taesd. It takes the UNet's latents as they are (scaling factor 1). Encoding stays with
the checkpoint's own VAE.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..stages.errors import CheckpointError
from .config import architecture, vae_pixels_per_latent
from .diffusers_folder import read_json
from .layout import PartWeights, read_parts
from .weight_files import find_weights

CLASS: Final = "AutoencoderTiny"
OPTION: Final = "--vae-decoder"
_REQUIRED: Final = {"decoder_block_out_channels": list, "num_decoder_blocks": list, "latent_channels": int}
_DEFAULTS: Final = {"scaling_factor": 1.0, "shift_factor": 0.0, "out_channels": 3, "force_upcast": False}


def read_tiny_decoder(
    place: Path, latent_channels: int, pixels: int
) -> tuple[dict[str, Any], PartWeights, Mapping[str, Path]]:
    """Configuration, weights, and files by label, of the diffusers folder `place`.

    Args:
        latent_channels: of the UNet that it is to follow.
        pixels: a latent, of the checkpoint's own VAE.
    Raises:
        CheckpointError: it holds another model, or one for other latents.
    """
    file = place / "config.json"
    if not place.is_dir() or not file.is_file():
        raise CheckpointError(f"{OPTION} {place}: no folder with a config.json", hint=f"give the folder of an {CLASS}")
    raw = read_json(file)
    if raw.get("_class_name") != CLASS:
        raise CheckpointError(
            f"{OPTION} {place}: is {raw.get('_class_name')!r}, not {CLASS!r}",
            hint="a whole VAE is given with --vae; TAESD and TAEXL are decoders",
        )
    for key, kind in _REQUIRED.items():
        if not isinstance(raw.get(key), kind):
            raise CheckpointError(f"{file}: {key!r} is {raw.get(key)!r}, a {kind.__name__} is needed")
    if raw["latent_channels"] != latent_channels:
        raise CheckpointError(
            f"{OPTION} {place}: latents of {raw['latent_channels']} channels, the UNet draws {latent_channels}",
            hint="it is for another family",
        )
    # diffusers derives this name, which other autoencoders have, from the decoder's own
    levels = {"block_out_channels": raw["decoder_block_out_channels"]}
    if (made := vae_pixels_per_latent(levels)) != pixels:
        raise CheckpointError(
            f"{OPTION} {place}: makes {made} pixels of a latent, the checkpoint's VAE makes {pixels}",
            hint="it is for another family",
        )
    found = find_weights(place)
    places = {f"vae_decoder/{each.name}": each for each in (file, *found.places)}
    return {**_DEFAULTS, **architecture(raw), **levels}, read_parts(found.files), places
