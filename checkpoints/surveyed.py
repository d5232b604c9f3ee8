"""The second look at a checkpoint: every file hashed, every weight known to be finite."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import rfc8785

from ..stages.artifacts import Checkpoint, ComponentSource, StoredTensor
from ..stages.errors import CheckpointError
from ..stages.hashing import sha256_of_file
from ..stages.plain_file import read_plain
from .pickled_file import is_pickled
from .survey import Survey, refuse_non_finite
from .survey import survey as survey_file
from .weights import Weights


def surveyed(checkpoint: Checkpoint, memo: Path | None) -> Checkpoint:
    """`checkpoint` with every file hashed and all weights known to be finite.

    Args:
        memo: as of `open_checkpoint`.
    Raises:
        CheckpointError: a file cannot be read, or a weight is NaN or infinite.
    """
    weights = {file for source in checkpoint.components.values() for file in source.files}
    sources: dict[str, str] = {}
    surveys: dict[Path, Survey] = {}
    adapters = {checkpoint.places[adapter.place] for adapter in checkpoint.adapters}
    for label, place in checkpoint.places.items():
        if place in adapters:  # its factors are digested with the weights that they change
            sources[label] = sha256_of_file(place)
        elif place in weights:
            surveys[place] = survey_file(place, tensors=_listed(checkpoint, place), memo=memo)
            refuse_non_finite(place, surveys[place])
            sources[label] = surveys[place].sha256
        else:
            sources[label] = _hash_small(place)
    components = {
        name: replace(source, digest=_digest_component(source, checkpoint.root, surveys))
        for name, source in checkpoint.components.items()
    }
    facts = {
        "family": checkpoint.family,
        "components": {name: source.digest for name, source in components.items()},
        "scheduler": checkpoint.scheduler,
        "tokenizer": {
            name: digest for name, digest in sources.items() if name.startswith(("tokenizer/", "tokenizer_2/"))
        },
        "pipeline": checkpoint.pipeline,
        "settings": checkpoint.settings,
    }
    return replace(checkpoint, components=components, sources=sources, digest=_digest(facts, checkpoint.root))


def _listed(checkpoint: Checkpoint, place: Path) -> list[StoredTensor] | None:
    """The tensors of a file that has no safetensors header."""
    if place.is_file() and not is_pickled(place):
        return None
    return [tensor for source in checkpoint.components.values() for tensor in source.tensors if tensor.file == place]


def _hash_small(file: Path) -> str:
    try:
        return hashlib.sha256(read_plain(file)).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}", hint="check its rights") from error


def _digest_component(source: ComponentSource, root: Path, surveys: Mapping[Path, Survey]) -> str:
    """By content: names, dtypes and values of the tensors as mapped, and the configuration; not by file or family."""
    facts = {
        "component": source.component,
        "config": source.config,
        "weights": Weights(source).content({file: found.tensors for file, found in surveys.items()}),
    }
    return _digest(facts, root)


def _digest(facts: Mapping[str, Any], root: Path) -> str:
    try:
        return hashlib.sha256(rfc8785.dumps(dict(facts))).hexdigest()
    except rfc8785.CanonicalizationError as error:
        raise CheckpointError(f"{root}: a config holds a value that JSON cannot carry exactly: {error}") from error
