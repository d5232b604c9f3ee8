"""What opening a checkpoint found, whatever its layout: the configurations a diffusers folder has, and the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..pipeline.artifacts import Companions, StoredTensor
from .adapters.text_width import refuse_other_width
from .diffusers_folder import INDEX, config_file, find_tokenizer_files, read_headers
from .families import Headers, recognise
from .safetensors_file import read_header
from .weight_files import FolderWeights, find_weights, remarks_on_variants


@dataclass(frozen=True, slots=True)
class PartWeights:
    """Weights of one part (`unet`, `vae`, ...): its files, and its tensors."""

    files: tuple[Path, ...]
    tensors: tuple[StoredTensor, ...]
    renamed: bool = False  # `tensors` have other names or shapes than the headers of `files` give them


@dataclass(frozen=True, slots=True)
class Layout:
    """A checkpoint taken apart. `places` names every file that decides the result by a label without machine paths."""

    root: Path
    headers: Headers
    weights: Mapping[str, PartWeights]
    places: Mapping[str, Path]
    tokenizer: Path
    tokenizer_2: Path | None = None  # of the second text encoder
    remarks: tuple[str, ...] = field(default=())
    prediction_why: str = ""  # who says what the UNet predicts, where that is not the scheduler's configuration

    def config_place(self, part: str) -> str:
        """Where the configuration of `part` is stated, for errors."""
        label = f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json"
        return str(self.places.get(label, self.root))

    def with_part(
        self, part: str, config: Mapping[str, Any], weights: PartWeights, places: Mapping[str, Path]
    ) -> Layout:
        """The layout with another `part`, whose files are `places` (labels below `part`/)."""
        headers = replace(
            self.headers,
            configs={**self.headers.configs, part: config},
            tensors={**self.headers.tensors, part: {t.name: t.shape for t in weights.tensors}},
        )
        kept = {label: place for label, place in self.places.items() if not label.startswith(f"{part}/")}
        return replace(self, headers=headers, weights={**self.weights, part: weights}, places={**kept, **places})


def read_folder(root: Path, given: Companions) -> Layout:
    """A diffusers folder. Unsupported ones are refused before their weights are looked at.

    Raises:
        CheckpointError: its family is not supported, or a component is missing or damaged.
    """
    headers = read_headers(root)
    if given.vae is not None:
        from .single_file.vae import read_vae

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


def read_parts(files: tuple[Path, ...]) -> PartWeights:
    """The tensors of `files` as their headers name them."""
    return PartWeights(files, tuple(tensor for file in files for tensor in read_header(file).values()))
