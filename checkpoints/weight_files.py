"""The weight files of one component's folder: whole, sharded, or of a variant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Final

from pydantic import BaseModel, ValidationError

from ..stages.errors import CheckpointError
from .diffusers_folder import first_problem, read_json
from .file_kind import SAFE_COPY
from .safetensors_file import read_header

# transformers and diffusers save under these names (their WEIGHTS_NAME constants)
_STEMS: Final = ("diffusion_pytorch_model", "model")
_PICKLES: Final = ("diffusion_pytorch_model.bin", "pytorch_model.bin")
_LONGEST_NAME: Final = 255  # characters of a file's name, NAME_MAX of limits.h
_VARIANTS: Final = ("", "fp16", "bf16")  # the full-precision file first
# a file or an index of any variant, in today's names and in those of diffusers before 0.30
_VARIANT_FILE: Final = re.compile(
    rf"({'|'.join(_STEMS)})(\.safetensors\.index\.(?P<a>\w+)\.json|\.safetensors\.(?P<b>\w+)\.index\.json|"
    r"\.(?P<c>\w+)\.safetensors)"
)


@dataclass(frozen=True, slots=True)
class FolderWeights:
    """What a component's folder holds."""

    files: tuple[Path, ...]
    index: Path | None = None  # names the shards
    variant: str = ""  # one that is taken only because there is nothing else: "non_ema", for example

    @property
    def places(self) -> tuple[Path, ...]:
        """Every file that decides the weights."""
        return (*self.files, *([self.index] if self.index else ()))


class _ShardIndex(BaseModel):
    """A `*.safetensors.index.json`."""

    weight_map: dict[str, str]  # tensor name -> file name


def find_weights(folder: Path) -> FolderWeights:
    """The safetensors files of one component.

    The full-precision file wins over `fp16`, that over `bf16`; any other variant is taken where it is all there is.

    Raises:
        CheckpointError: there are none, only pickles, several variants to choose from, or shards are missing or lie
            outside `folder`.
    """
    for variant in _VARIANTS:
        found = _of_variant(folder, variant)
        if found is not None:
            return found
    others = _other_variants(folder)
    if len(others) > 1:
        raise CheckpointError(
            f"{folder}: holds weights of the variants {', '.join(others)} and none without a variant",
            hint="leave the ones to convert, or rename them to the name without a variant",
        )
    for variant in others:
        found = _of_variant(folder, variant)
        if found is not None:
            return FolderWeights(found.files, found.index, variant)
    for pickle in (*_PICKLES, *(path.name for path in sorted(folder.glob("*.bin")))):
        if (folder / pickle).is_file():
            raise CheckpointError(f"{folder / pickle}: weights in a Python pickle", hint=SAFE_COPY)
    links = [path.name for path in folder.iterdir() if path.is_symlink() and not path.exists()]
    if links:
        raise CheckpointError(f"{folder}: {links[0]} is a link to a file that is gone", hint="download it again")
    raise CheckpointError(f"{folder}: no weights (*.safetensors) in it", hint="download the folder again")


def remarks_on_variants(found: dict[str, FolderWeights]) -> tuple[str, ...]:
    """What people should know about weights that were taken for want of others.

    Args:
        found: by part (`unet`, ...).
    """
    parts: dict[str, list[str]] = {}
    for part, weights in found.items():
        if weights.variant:
            parts.setdefault(weights.variant, []).append(part)
    meaning = {"non_ema": ", which are not averaged over training (EMA)"}
    return tuple(
        f"{', '.join(names)}: there are weights of the variant {variant!r} only{meaning.get(variant, '')}: taken"
        for variant, names in parts.items()
    )


def _of_variant(folder: Path, variant: str) -> FolderWeights | None:
    """The weights of one variant ("" is none), if `folder` has them."""
    dotted = f".{variant}" if variant else ""
    for stem in _STEMS:
        whole = folder / f"{stem}{dotted}.safetensors"
        indices = dict.fromkeys(
            (
                folder / f"{stem}.safetensors.index{dotted}.json",
                folder / f"{stem}.safetensors{dotted}.index.json",  # before diffusers 0.30
            )
        )
        index = next((file for file in indices if file.is_file()), None)
        if whole.is_file() and index is not None:
            raise CheckpointError(f"{folder}: holds both {whole.name} and {index.name}", hint="delete the older one")
        if whole.is_file():
            return FolderWeights((whole,))
        if index is not None:
            return FolderWeights(_shards(folder, index), index)
    return None


def _other_variants(folder: Path) -> list[str]:
    matches = (_VARIANT_FILE.fullmatch(file.name) for file in folder.iterdir() if file.is_file())
    return sorted({match["a"] or match["b"] or match["c"] for match in matches if match})


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    try:
        weight_map = _ShardIndex.model_validate(read_json(index)).weight_map
    except ValidationError as error:
        raise CheckpointError(
            f"{index}: not a shard index: {first_problem(error)}", hint="download the file again"
        ) from error
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if shard in ("", ".", "..") or PurePosixPath(shard).name != shard or PureWindowsPath(shard).name != shard:
            raise CheckpointError(
                f"{index}: shard {shard!r} lies outside its folder", hint="the file was tampered with"
            )
        if len(shard) > _LONGEST_NAME or not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder / shard!s:.4096}: shard is missing, {index.name} names it", hint="download it too"
            )
    found = {name: shard for shard in shards for name in read_header(folder / shard)}
    wrong = sorted(name for name in weight_map.keys() | found.keys() if weight_map.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{index}: {len(wrong)} tensors are not where it says: {name!r} in {weight_map.get(name)}, "
            f"found in {found.get(name)}",
            hint="the shards belong to another version of the index: download both again",
        )
    return tuple(folder / shard for shard in shards)
