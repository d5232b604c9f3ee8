"""Opening a checkpoint: what it is, whether it is whole, and where its weights lie. Nothing in it is executed."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import rfc8785

from ..pipeline.artifacts import Checkpoint, ComponentSource
from ..pipeline.errors import CheckpointError
from .diffusers_folder import INDEX, config_file, find_weights, read_headers
from .families import Family, Headers, Part, recognise, refuse_unsupported
from .graph import architecture
from .loose_file import refuse_loose
from .safetensors_file import StoredTensor, read_header
from .survey import refuse_non_finite
from .survey import survey as survey_file
from .weights import current_names

DEMO: Final = "demo"
DEMO_FOLDER: Final = Path(__file__).resolve().parent.parent / "demo"
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_WEIGHT_DTYPES: Final = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True, slots=True)
class _Stored:
    """The weight files of one folder, and the tensors that their headers list."""

    files: tuple[Path, ...]
    index: Path | None
    tensors: tuple[StoredTensor, ...]


def open_checkpoint(path: Path | str, *, memo: Path | None = None, survey: bool = True) -> Checkpoint:
    """Recognise the checkpoint at `path`, check it, and point at its parts.

    Everything but NaN weights is told from configs and headers, before any weight is read.

    Args:
        path: a diffusers folder; the word "demo" is the embedded checkpoint (for a folder of yours with that name,
            give its absolute path).
        memo: folder that remembers what a pass over a weight file found; None reads every weight file again.
        survey: False reads headers only, in milliseconds for any size, and leaves every `digest` and the values of
            `sources` empty: enough to say what a checkpoint is, not enough to convert it.
    Raises:
        CheckpointError: there is none, the family is not supported, a component is missing or damaged, weights lie
            in a pickle, or are NaN or infinite.
    """
    is_demo = str(path) == DEMO
    root = DEMO_FOLDER if is_demo else Path(path).absolute()
    try:
        if not (root / INDEX).is_file():
            refuse_loose(root)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CheckpointError(
            f"{root}: cannot be opened: {error.strerror}", hint="check the path and its rights"
        ) from None
    headers = read_headers(root)
    family, why = recognise(headers, str(root))
    stored = {part.folder: _read_stored(root / part.folder) for part in family.components.values()}
    # configs can lie about what the weights are
    names = {folder: {tensor.name: tensor.shape for tensor in found.tensors} for folder, found in stored.items()}
    refuse_unsupported(replace(headers, tensors=names), str(root))
    files = [root / INDEX, config_file(root, "scheduler"), *_tokenizer_files(root / "tokenizer")]
    for folder, found in stored.items():
        files += [config_file(root, folder), *found.files, *([found.index] if found.index else ())]
    checkpoint = Checkpoint(
        name=DEMO if is_demo else root.name,
        root=root,
        family=family.name,
        why=why,
        components={
            name: _component(family, name, headers, root, stored[part.folder])
            for name, part in family.components.items()
        },
        scheduler=_completed_scheduler(headers, root),
        tokenizer=root / "tokenizer",
        sources={file.relative_to(root).as_posix(): "" for file in sorted(files)},
        digest="",
    )
    return _surveyed(checkpoint, memo) if survey else checkpoint


def _read_stored(folder: Path) -> _Stored:
    files, index = find_weights(folder)
    return _Stored(files, index, tuple(tensor for file in files for tensor in read_header(file).values()))


def _component(family: Family, name: str, headers: Headers, root: Path, stored: _Stored) -> ComponentSource:
    part = family.components[name]
    config = _completed_config(part, headers, root)
    tensors = current_names(stored.tensors, part)
    if not tensors:
        raise CheckpointError(
            f"{root / part.folder}: no tensor of {name} in it", hint="the weights are of another model"
        )
    values: Counter[str] = Counter()
    for tensor in tensors.values():
        values[tensor.dtype.name] += math.prod(tensor.shape)
        if tensor.dtype.name not in _WEIGHT_DTYPES:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name!r} is stored as {tensor.dtype.name}",
                hint=f"weights must be one of {', '.join(_WEIGHT_DTYPES)}: take a checkpoint that is not quantized",
            )
    return ComponentSource(
        component=name,
        family=family.name,
        config=config,
        files=stored.files,
        digest="",
        parameters=values.total(),
        dtype=values.most_common(1)[0][0],
    )


def _completed_config(part: Part, headers: Headers, root: Path) -> dict[str, Any]:
    """The config with what old versions leave out; unknown keys stay, as diffusers itself ignores them."""
    stated = headers.parts[part.folder]
    if stated not in part.classes:
        raise CheckpointError(
            f"{root / INDEX}: {part.folder} is a {stated}, not a {' or '.join(part.classes)}",
            hint="this component is not supported yet",
        )
    raw = headers.configs[part.folder]
    for key, kind in part.required.items():
        if not isinstance(raw.get(key), kind):
            found = f"{raw[key]!r}" if key in raw else "missing"
            raise CheckpointError(
                f"{config_file(root, part.folder)}: {key!r} is {found}, a {kind.__name__} is needed",
                hint="take config.json from the same checkpoint as the weights",
            )
    return {**part.defaults, **architecture(raw)}


def _completed_scheduler(headers: Headers, root: Path) -> dict[str, Any]:
    config = dict(headers.configs["scheduler"])
    file = config_file(root, "scheduler")
    if not isinstance(config.setdefault("_class_name", headers.parts["scheduler"]), str):
        raise CheckpointError(f"{file}: _class_name is {config['_class_name']!r}, not a name")
    if config.get("lambda_min_clipped") == -math.inf:  # the default of every class that has it: the DPM solvers, SA
        del config["lambda_min_clipped"]
    for key, value in config.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise CheckpointError(
                f"{file}: {key!r} is {repr(value)[:80]}, a finite number is needed",
                hint="take scheduler_config.json from where the checkpoint was whole",
            ) from None
    return architecture(config)


def _tokenizer_files(folder: Path) -> list[Path]:
    found = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    names = {file.name for file in found}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise CheckpointError(
            f"{folder}: component 'tokenizer' is missing: neither tokenizer.json nor vocab.json with merges.txt",
            hint="download the folder again",
        )
    return found


def _surveyed(checkpoint: Checkpoint, memo: Path | None) -> Checkpoint:
    """`checkpoint` with every file hashed and all weights known to be finite."""
    root = checkpoint.root
    weights = {file for source in checkpoint.components.values() for file in source.files}
    sources: dict[str, str] = {}
    for name in checkpoint.sources:
        if root / name in weights:
            found = survey_file(root / name, memo=memo)
            refuse_non_finite(root / name, found)
            sources[name] = found.sha256
        else:
            sources[name] = _hash_small(root / name)
    components = {
        name: replace(source, digest=_digest_component(source, root, sources))
        for name, source in checkpoint.components.items()
    }
    facts = {
        "family": checkpoint.family,
        "components": {name: source.digest for name, source in components.items()},
        "scheduler": checkpoint.scheduler,
        "tokenizer": {name: digest for name, digest in sources.items() if name.startswith("tokenizer/")},
    }
    return replace(checkpoint, components=components, sources=sources, digest=_digest(facts, root))


def _hash_small(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}", hint="check its rights") from error


def _digest_component(source: ComponentSource, root: Path, sources: Mapping[str, str]) -> str:
    weights = [sources[file.relative_to(root).as_posix()] for file in source.files]
    facts = {"component": source.component, "family": source.family, "config": source.config, "weights": weights}
    return _digest(facts, root)


def _digest(facts: Mapping[str, Any], root: Path) -> str:
    try:
        return hashlib.sha256(rfc8785.dumps(dict(facts))).hexdigest()
    except rfc8785.CanonicalizationError as error:
        raise CheckpointError(f"{root}: a config holds a value that JSON cannot carry exactly: {error}") from error
