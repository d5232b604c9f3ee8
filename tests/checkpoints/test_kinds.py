"""The tiny checkpoints of the other tests: that they are what they are named after."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusette.checkpoints.safetensors_file import read_header

from ..kinds import KINDS

VAE = "vae/diffusion_pytorch_model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


def config(folder: Path, part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / part / "config.json").read_text())
    return found


@pytest.mark.parametrize("name", list(KINDS))
def test_a_kind_has_the_parts_and_the_settings_of_its_published_checkpoints(
    name: str, kind_folder: Callable[[str], Path]
) -> None:
    folder, kind = kind_folder(name), KINDS[name]
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == kind.pipeline
    assert (folder / "text_encoder_2").is_dir() == (kind.family == "sdxl")
    stated = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert stated.pop("_class_name") == kind.scheduler
    assert {key: stated[key] for key in kind.settings} == dict(kind.settings)
    assert (config(folder, "text_encoder")["hidden_act"] == "gelu") == (kind.family == "sd2")
    unet = config(folder, "unet")
    assert (unet["time_cond_proj_dim"] is not None) == name.endswith("lcm")
    has_middle = any(tensor.startswith("mid_block.") for tensor in read_header(folder / UNET))
    assert has_middle == (name not in ("bk-sdm-tiny", "segmind"))


def test_kinds_share_what_they_have_in_common_to_the_byte(kind_folder: Callable[[str], Path]) -> None:
    one, other = kind_folder("sd1"), kind_folder("sdxl")
    assert (one / VAE).read_bytes() == (other / VAE).read_bytes()
    turbo, base = kind_folder("sd-turbo"), kind_folder("sd2-base")
    assert (turbo / UNET).read_bytes() == (base / UNET).read_bytes()
