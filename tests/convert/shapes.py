"""Checkpoints of published shapes that have no files: enough to forecast."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from diffusette.stages.artifacts import Checkpoint, ComponentSource

from ..bundle.tiny_bundle import A_VARIANT

ROOT = Path(__file__).parents[2]
# Parameters of the components of published checkpoints.
PARAMETERS = {
    "sd15": {"text_encoder": 123_060_480, "unet": 859_520_964, "vae_decoder": 49_490_199, "vae_encoder": 34_163_664},
    "sd21": {"text_encoder": 340_387_840, "unet": 865_910_724, "vae_decoder": 49_490_199, "vae_encoder": 34_163_664},
    "sdxl": {
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
        "vae_decoder": 49_490_199,
        "vae_encoder": 34_163_664,
    },
}


@cache
def shapes() -> dict[str, Any]:
    """The configurations that the benchmarks write."""
    spec = importlib.util.spec_from_file_location("make_checkpoint", ROOT / "benchmarks" / "make_checkpoint.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.SHAPES
    return found


def checkpoint(kind: str, dtype: str = "float16") -> Checkpoint:
    """A checkpoint of these shapes that has no files."""
    configs = shapes()[kind]
    parts = {
        name: ComponentSource(
            name, "sd1", configs["vae" if name.startswith("vae") else name], (), "0" * 64, count, dtype
        )
        for name, count in PARAMETERS[kind].items()
    }
    return Checkpoint(kind, Path(), "sd1", "", parts, {}, Path(), {}, "0" * 64, A_VARIANT)
