"""diffusette: diffusion models, pocket size.

The public names below are resolved on first use, so that `import diffusette` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .bundle.bundle import open_bundle
    from .bundle.draw import draw_with_bundle
    from .checkpoints.checkpoint import open_checkpoint
    from .convert.convert import convert_checkpoint
    from .validate.check import check_bundle
    from .validate.speed.measure import measure_bundle

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "check_bundle",
    "convert_checkpoint",
    "draw_with_bundle",
    "measure_bundle",
    "open_bundle",
    "open_checkpoint",
]

# Name -> where it is. No public function may be called like a folder (convert, export, quantize, validate): importing
# the folder would replace the function by the module.
_PUBLIC: Final = {
    "check_bundle": (".validate.check", "check_bundle"),
    "convert_checkpoint": (".convert.convert", "convert_checkpoint"),
    "draw_with_bundle": (".bundle.draw", "draw_with_bundle"),
    "measure_bundle": (".validate.speed.measure", "measure_bundle"),
    "open_bundle": (".bundle.bundle", "open_bundle"),
    "open_checkpoint": (".checkpoints.checkpoint", "open_checkpoint"),
}


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _PUBLIC[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(import_module(module, __name__), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
