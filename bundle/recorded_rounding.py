"""How a bundle was rounded, read from the recipe that it carries."""

from __future__ import annotations

import json
import tomllib
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from ..stages.errors import BundleError
from ..stages.strict import adapter

if TYPE_CHECKING:
    from ..quantize.rounding import Rounding
    from .bundle import Bundle

_KEYS: Final = {
    "method": ("quantize", "rounding"),
    "activations": ("quantize", "activations"),
    "ranges": ("calibrate", "ranges"),
    "prompts": ("calibrate", "prompts"),
}


def recorded_rounding(bundle: Bundle) -> Rounding:
    """How `bundle` was rounded; where its recipe says nothing, as recipes do without saying it.

    Raises:
        BundleError: its recipe is no TOML, or rounds in no way that is known.
    """
    from ..quantize.rounding import Rounding

    try:
        data: dict[str, Any] = tomllib.loads(bundle.manifest.recipe)
        tables = {field: (data.get(table, {}), key) for field, (table, key) in _KEYS.items()}
        stated = {field: table[key] for field, (table, key) in tables.items() if key in table}
        rounding: Rounding = adapter(Rounding).validate_json(json.dumps(stated), strict=True)
    except (ValueError, TypeError, RecursionError) as error:
        why = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
        raise BundleError(
            f"{bundle.path}: the recipe in its manifest cannot be read: {why}", hint="convert the checkpoint again"
        ) from None
    return rounding
