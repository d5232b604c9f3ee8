"""Pydantic models that refuse what they do not know, with errors in the words of the file that a user wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, Final, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from .errors import DiffusetteError, refuse_unknown

Location = tuple[str | int, ...]
Where = Callable[[Location], str]

_LONGEST_VALUE: Final = 80  # characters of an offending value that a message shows


class Strict(BaseModel):
    """Frozen; unknown keys, values of a near-by type ("20" for 20), NaN and infinity are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_by_name=True, serialize_by_alias=True
    )


Model = TypeVar("Model", bound=Strict)


@cache
def adapter(kind: type) -> TypeAdapter[Any]:
    """Reads and writes values of a dataclass. Made once for each: that takes longer than what it does."""
    return TypeAdapter(kind)


def parsed(model: type[Model], data: Mapping[str, Any], where: Where, error: type[DiffusetteError]) -> Model:
    """Turn `data`, as read from TOML or JSON, into `model`.

    Args:
        where: names a place in the file for people, from its keys and indices.
        error: raised for the first thing that is wrong; an unknown key comes first, since a typo also leaves
            the right key missing.
    """
    try:
        # JSON mode: strict, but an array is a tuple, which is what both file formats mean by it.
        return model.model_validate_json(json.dumps(data, allow_nan=False))
    except ValidationError as invalid:
        problems = invalid.errors(include_url=False)
    except (ValueError, TypeError, RecursionError) as unusual:  # TOML knows NaN, infinity and dates; JSON does not
        raise error(f"{where(())}: {unusual}", hint="use plain strings, numbers, booleans, arrays and tables") from None
    for problem in problems:
        if problem["type"] == "extra_forbidden":
            table, key = problem["loc"][:-1], problem["loc"][-1]
            refuse_unknown([str(key)], sorted(_keys_at(model, table)), where(table), error)
    problem = problems[0]
    location, context = problem["loc"], problem.get("ctx", {})
    # A location ends with an index for one bad element; people look for the key.
    table = location[: max((i for i, step in enumerate(location) if isinstance(step, str)), default=0)]
    path = "".join(f"[{step}]" if isinstance(step, int) else str(step) for step in location[len(table) :])
    if problem["type"] == "missing":
        raise error(f"{where(table)}: {path!r} is missing", hint=str(context.get("hint", "")))
    value = json.dumps(problem["input"], ensure_ascii=False)
    shown = value if len(value) <= _LONGEST_VALUE else value[: _LONGEST_VALUE - 3] + "..."
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    what = f"{where(table)}: {path} = {shown}: {message}" if path else f"{where(table)}: {message}"
    raise error(what, hint=str(context.get("hint", "")) or _nearest(problem["input"], str(context.get("expected", ""))))


def _nearest(value: object, expected: str) -> str:
    """A hint out of pydantic's `'onnx' or 'ort'`."""
    near = get_close_matches(str(value), expected.split("'")[1::2], n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def _keys_at(annotation: Any, location: Location) -> Iterator[str]:
    """The keys that the model at `location` below `annotation` knows."""
    for step in location:
        if isinstance(step, int):
            continue
        if (values := _values_of_mapping(annotation)) is not None:
            annotation = values
        else:
            annotation = next(f.annotation for n, f in _model(annotation).model_fields.items() if step in (n, f.alias))
    for name, field in _model(annotation).model_fields.items():
        yield field.alias or name


def _values_of_mapping(annotation: Any) -> Any | None:
    if get_origin(annotation) is dict:
        return get_args(annotation)[1]
    return next((v for a in get_args(annotation) if (v := _values_of_mapping(a)) is not None), None)


def _model(annotation: Any) -> type[BaseModel]:
    """The model inside `annotation`: of `tuple[Rule, ...] | None` it is Rule."""
    return next(_models(annotation))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
