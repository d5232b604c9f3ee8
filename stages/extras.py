"""What is installed beside the core: `pip install diffusette` brings what reads a bundle, extras the rest.

The extras are those of pyproject.toml: a runtime each (`ort`, `ncnn`, `mnn`), and `convert`, which has all of them. A
command asks here first, so that what is missing is told at once and not after minutes. docs/decisions/0105.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Final

from .errors import MissingTool

CONVERTER: Final = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "yaml", "ml_dtypes",
    "onnx", "onnx_ir", "onnxscript", "onnxsim", "tomli_w", "regex", "scipy", "skimage", "jinja2", "matplotlib",
)  # fmt: skip
"""Modules that only the extra `convert` brings."""


def require_modules(modules: Sequence[str], what: str, extra: str) -> None:
    """Look for top-level modules without importing them.

    Raises:
        MissingTool: one is absent; says which, and the extra that brings it.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MissingTool(
            f"{what} needs the package {missing[0]}{others}, not installed here",
            hint=f"pip install 'diffusette[{extra}]'",
        )


def require_converter(what: str) -> None:
    """As `require_modules`, for what opens checkpoints, builds models and asks PyTorch."""
    require_modules(CONVERTER, what, "convert")
