"""A diffusers folder, taken apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..stages.artifacts import Companions
from .adapters.text_width import refuse_other_width
from .diffusers_folder import INDEX, config_file, find_tokenizer_files, read_headers
from .families import recognise
from .layout import Layout, read_parts
from .single_file.vae import read_vae
from .weight_files import FolderWeights, find_weights, remarks_on_variants


def read_folder(root: Path, given: Companions) -> Layout:
    """A diffusers folder. Unsupported ones are refused before their weights are looked at.

    Raises:
        CheckpointError: its family is not supported, or a component is missing or damaged.
    """
    headers = read_headers(root)
    if given.vae is not None:
        config, _, _ = read_vae(given.vae, headers.configs.get("vae", {}))
        headers = replace(
            headers,
            parts={"vae": "AutoencoderKL", **headers.parts},
            configs={**headers.configs, "vae": config},
        )
    family, _ = recognise(headers, str(root))
    refuse_other_width(given.adapters, headers.setting("unet.cross_attention_dim"))
    stored: dict[str, FolderWeights] = {}
    places = {INDEX: root / INDEX}
    tokenizer = given.tokenizer or root / "tokenizer"
    files = [config_file(root, "scheduler")]
    for part in dict.fromkeys(part.folder for part in family.components.values()):
        if part == "vae" and given.vae is not None:
            continue  # it is taken from there
        stored[part] = find_weights(root / part)
        files += [config_file(root, part), *stored[part].places]
    weights = {part: read_parts(found.files) for part, found in stored.items()}
    places |= {file.relative_to(root).as_posix(): file for file in files}
    places |= {f"tokenizer/{file.name}": file for file in find_tokenizer_files(tokenizer)}
    second = root / "tokenizer_2" if "tokenizer_2" in family.signature.parts else None
    places |= {f"tokenizer_2/{file.name}": file for file in find_tokenizer_files(second)} if second else {}
    shapes = {part: {tensor.name: tensor.shape for tensor in found.tensors} for part, found in weights.items()}
    remarks = remarks_on_variants(stored)
    return Layout(root, replace(headers, tensors=shapes), weights, places, tokenizer, second, remarks)
