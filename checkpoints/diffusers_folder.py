"""The layout of a diffusers folder: model_index.json, a folder a component with its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..stages.artifacts import PIPELINE_SETTINGS
from ..stages.errors import CheckpointError
from ..stages.plain_file import read_plain
from .families import Headers
from .file_kind import FOLDER

INDEX: Final = "model_index.json"
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_CONFIG_FILES: Final = {"scheduler": "scheduler_config.json"}  # every other component: config.json


class _ModelIndex(BaseModel):
    """What we read of model_index.json. All other keys are components, or settings of pipelines to come."""

    model_config = ConfigDict(extra="allow")
    pipeline: str = Field(alias="_class_name")

    def parts(self) -> dict[str, str]:
        """Component -> class name. `[null, null]` stands for a component left out, such as the safety checker."""
        extra: Mapping[str, Any] = self.model_extra or {}
        return {
            part: value[1]
            for part, value in extra.items()
            if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
        }


def read_headers(root: Path) -> Headers:
    """Read model_index.json and every config that it points at. No weight file is touched.

    Raises:
        CheckpointError: there is no model_index.json, or a file is not the JSON that it should be.
    """
    file = root / INDEX
    try:
        index = _ModelIndex.model_validate(read_json(file))
    except ValidationError as error:
        raise CheckpointError(f"{file}: not a diffusers index: {first_problem(error)}", hint=FOLDER) from error
    parts = index.parts()
    for part in parts:
        if not part.isidentifier():
            raise CheckpointError(f"{file}: {part!r} is no name of a component", hint="the file was tampered with")
    present = {part: config_file(root, part) for part in parts if config_file(root, part).is_file()}
    # diffusers writes a scheduler's default of minus infinity as it is; the scheduler's reader knows which key that is
    configs = {part: read_json(path, finite=part != "scheduler") for part, path in present.items()}
    stated: Mapping[str, Any] = index.model_extra or {}
    settings = {name: stated[name] for name in PIPELINE_SETTINGS if isinstance(stated.get(name), bool)}
    return Headers(index.pipeline, parts, configs, settings=settings)


def config_file(root: Path, part: str) -> Path:
    """Where the configuration of a component lies."""
    return root / part / _CONFIG_FILES.get(part, "config.json")


def read_json(file: Path, *, finite: bool = True) -> dict[str, Any]:
    """Read a JSON object; numbers that JSON does not have (NaN, Infinity) are refused unless `finite` is False."""
    try:
        content = json.loads(read_plain(file).decode("utf-8"), parse_constant=_no_constant if finite else None)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file", hint=FOLDER) from None
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read: {error.strerror}", hint="check the path and its rights"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}", hint="download the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file}: a JSON {type(content).__name__} where an object belongs", hint="download the file again"
        )
    return content


def find_tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer's folder that decide what it does.

    Raises:
        CheckpointError: there is no tokenizer in it.
    """
    found = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    names = {file.name for file in found}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise CheckpointError(
            f"{folder}: component {folder.name!r} is missing: neither tokenizer.json nor vocab.json with merges.txt",
            hint="download the folder again",
        )
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def first_problem(error: ValidationError) -> str:
    """Of all that pydantic finds wrong, the first, with its place."""
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
