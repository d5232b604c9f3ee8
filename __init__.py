"""diffusette: diffusion models, pocket size.

The public names below are resolved on first use, so that `import diffusette` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .export.checkpoint import open_checkpoint
    from .pipeline.bundle import open_bundle
    from .pipeline.convert import convert

__version__ = "0.1.0"

__all__ = ["__version__", "convert", "open_bundle", "open_checkpoint"]

# No public function may be called like a folder (export, quantize, validate): importing the folder
# would replace the function by the module.
_PUBLIC: Final = {
    "convert": ".pipeline.convert",
    "open_bundle": ".pipeline.bundle",
    "open_checkpoint": ".export.checkpoint",
}


def __getattr__(name: str) -> Any:
    try:
        module = _PUBLIC[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(import_module(module, __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
