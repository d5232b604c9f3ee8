"""What opening a checkpoint found, whatever its layout: the configurations a diffusers folder has, and the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..stages.artifacts import StoredTensor
from .families import Headers
from .safetensors_file import read_header


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


def read_parts(files: tuple[Path, ...]) -> PartWeights:
    """The tensors of `files` as their headers name them."""
    return PartWeights(files, tuple(tensor for file in files for tensor in read_header(file).values()))
