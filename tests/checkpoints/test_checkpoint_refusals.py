"""Damage of a diffusers folder, each told by name, place and remedy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.stages.errors import CheckpointError

from ..models import (
    TEXT_WEIGHTS,
    UNET_WEIGHTS,
    VAE_WEIGHTS,
    edit_json,
    lone_safetensors,
    poison,
    truncate,
)
from .opening import refusal_of


def test_nothing_there(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal_of(tmp_path / "nothing")
    assert "no such file or folder" in refusal_of("some-owner/some-model")


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, tiny_folder: Path) -> None:
    assert "not a checkpoint: no model_index.json" in refusal_of(tmp_path)
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(tiny_folder.parent)
    assert refusal.value.hint == f"did you mean {tiny_folder}?"
    snapshot = shutil.copytree(tiny_folder, tmp_path / "models--owner--name/snapshots/abc")
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(tmp_path / "models--owner--name")
    assert refusal.value.hint == f"did you mean {snapshot}?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "a JSON list where an object belongs"),
        ("{}", "_class_name: Field required"),
        ('{"_class_name": "StableDiffusionPipeline", "../up": ["a", "B"]}', "'../up' is no name of a component"),
    ],
)
def test_a_broken_index(content: str, message: str, tiny_copy: Path) -> None:
    (tiny_copy / "model_index.json").write_text(content)
    what = refusal_of(tiny_copy)
    assert message in what
    assert "model_index.json" in what


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae", "scheduler", "tokenizer"])
def test_a_component_whose_folder_is_gone_is_named(part: str, tiny_copy: Path) -> None:
    shutil.rmtree(tiny_copy / part)
    assert f"component '{part}' is missing" in refusal_of(tiny_copy)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_component_left_out_of_the_index_is_named(part: str, tiny_copy: Path) -> None:
    edit_json(tiny_copy / "model_index.json", {part: [None, None]})
    assert f"component '{part}' is missing" in refusal_of(tiny_copy)


@pytest.mark.parametrize("file", [UNET_WEIGHTS, VAE_WEIGHTS, TEXT_WEIGHTS])
def test_truncated_weights(file: str, tiny_copy: Path, no_weights_read: None) -> None:
    size = (tiny_copy / file).stat().st_size
    truncate(tiny_copy / file, 100)
    what = refusal_of(tiny_copy)
    assert f"weights end at byte {size - 100}, header promises {size}" in what
    assert file in what


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value: float, tiny_copy: Path) -> None:
    poison(tiny_copy / UNET_WEIGHTS, "conv_in.weight", 5, value)
    what = refusal_of(tiny_copy)
    assert "'conv_in.weight' holds 1 NaN or infinite values, the first at 5" in what
    assert UNET_WEIGHTS in what


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("unet/config.json", "block_out_channels", None),
        ("unet/config.json", "block_out_channels", 320),
        ("vae/config.json", "latent_channels", "4"),
        ("text_encoder/config.json", "vocab_size", None),
    ],
)
def test_a_config_without_a_key_that_is_needed(file: str, key: str, value: object, tiny_copy: Path) -> None:
    edit_json(tiny_copy / file, {key: value})
    what = refusal_of(tiny_copy)
    assert f"{key!r} is {value!r}" in what
    assert file in what
    edit_json(tiny_copy / file, {}, (key,))
    assert f"{key!r} is missing" in refusal_of(tiny_copy)


def test_a_config_with_a_number_that_json_does_not_have(tiny_copy: Path) -> None:
    edit_json(tiny_copy / "vae/config.json", {"scaling_factor": float("nan")})
    assert "NaN is no JSON number" in refusal_of(tiny_copy)


def test_a_scheduler_that_diffusers_saved_with_minus_infinity_opens_as_one_without(tiny_copy: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    edit_json(tiny_copy / "model_index.json", {"scheduler": ["diffusers", "DPMSolverMultistepScheduler"]})
    file = tiny_copy / "scheduler/scheduler_config.json"
    scheduler: Any = DPMSolverMultistepScheduler()
    scheduler.save_pretrained(file.parent)
    assert '"lambda_min_clipped": -Infinity' in file.read_text()
    found = open_checkpoint(tiny_copy)
    assert "lambda_min_clipped" not in found.scheduler
    edit_json(file, {}, ("lambda_min_clipped",))
    assert open_checkpoint(tiny_copy).digest == found.digest
    edit_json(file, {"lambda_min_clipped": -5.1})
    assert open_checkpoint(tiny_copy).scheduler["lambda_min_clipped"] == -5.1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta_end", float("nan")),
        ("beta_end", float("-inf")),
        ("lambda_min_clipped", float("inf")),
        ("trained_betas", [0.1, float("inf")]),
    ],
)
def test_any_other_number_of_a_scheduler_that_is_not_finite_is_named(key: str, value: object, tiny_copy: Path) -> None:
    edit_json(tiny_copy / "scheduler/scheduler_config.json", {key: value})
    assert f"scheduler_config.json: {key!r} is {value!r}, a finite number is needed" in refusal_of(tiny_copy)


def test_a_path_that_no_file_system_takes(tmp_path: Path) -> None:
    assert "cannot be opened: File name too long" in refusal_of(tmp_path / ("x" * 300))


def test_a_component_of_another_class(tiny_copy: Path) -> None:
    edit_json(tiny_copy / "model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]})
    assert "vae is a AutoencoderTiny, not a AutoencoderKL" in refusal_of(tiny_copy)


def test_weights_that_are_absent_or_a_dead_link(tiny_copy: Path) -> None:
    (tiny_copy / UNET_WEIGHTS).unlink()
    assert "no weights (*.safetensors)" in refusal_of(tiny_copy)
    (tiny_copy / UNET_WEIGHTS).symlink_to(tiny_copy / "gone")
    assert "link to a file that is gone" in refusal_of(tiny_copy)


def test_adapter_weights_in_the_place_of_a_component(tiny_copy: Path) -> None:
    lone_safetensors(tiny_copy / UNET_WEIGHTS, ("down_blocks.0.attentions.0.to_k.lora_A.weight",))
    assert "a LoRA or LyCORIS adapter" in refusal_of(tiny_copy)
