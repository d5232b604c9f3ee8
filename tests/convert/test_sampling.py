"""How a checkpoint is sampled is told from its headers, and a recipe that contradicts it is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.families import get_family
from diffusette.checkpoints.families.variant import reads_zeros_for_empty, tell_variant
from diffusette.convert.recipe import load_recipe, parse_recipe
from diffusette.convert.sampling import Sampling, conditioning_entry, recipe_for, sampling_of
from diffusette.stages.errors import CheckpointError, RecipeError

OpenKind = Callable[..., Any]


@pytest.fixture
def open_kind(kind_folder: Callable[[str], Path]) -> OpenKind:
    """A kind's checkpoint from its headers, with entries of its scheduler's configuration changed or (None) removed."""

    def opened(name: str, **scheduler: Any) -> Any:
        found = open_checkpoint(kind_folder(name), survey=False)
        changed = {key: value for key, value in {**found.scheduler, **scheduler}.items() if value is not None}
        variant = tell_variant(get_family(found.family), found.components["unet"].config, changed, found.root)
        return dataclasses.replace(found, scheduler=changed, variant=variant)

    return opened


@pytest.mark.parametrize(
    ("kind", "expected", "prediction", "recipe"),
    [
        ("sd1", Sampling("cfg", 7.5, 20), "epsilon", "sd1-fp16"),
        ("sd2", Sampling("cfg", 7.5, 20), "v_prediction", "sd2-fp16"),
        ("sd2-base", Sampling("cfg", 7.5, 20), "epsilon", "sd2-fp16"),
        ("sdxl", Sampling("cfg", 5.0, 20), "epsilon", "sdxl-fp16"),
        ("segmind", Sampling("cfg", 5.0, 20), "epsilon", "sdxl-fp16"),
        ("bk-sdm-tiny", Sampling("cfg", 7.5, 20), "epsilon", "sd1-fp16"),
        ("lcm", Sampling("embedded", 8.5, 4), "epsilon", "lcm-fp16"),
        ("sdxl-lcm", Sampling("embedded", 8.0, 4), "epsilon", "lcm-fp16"),
        ("sd-turbo", Sampling("none", 1.0, 4), "epsilon", "turbo-fp16"),
        ("sdxl-turbo", Sampling("none", 1.0, 4), "epsilon", "turbo-fp16"),
        ("sdxl-dmd2", Sampling("none", 1.0, 4), "epsilon", "few-step-fp16"),
    ],
)
def test_guidance_steps_prediction_and_recipe_need_no_hint(
    kind: str, expected: Sampling, prediction: str, recipe: str, open_kind: OpenKind, kind_folder: Any
) -> None:
    checkpoint = open_kind(kind)
    assert recipe_for(checkpoint) == recipe
    assert sampling_of(checkpoint, load_recipe(recipe)) == expected
    assert sampling_of(checkpoint, parse_recipe("schema = 1", "my.toml")) == expected
    assert checkpoint.variant.prediction_type == prediction


def test_a_model_trained_to_zero_terminal_snr_is_not_taken_for_turbo(open_kind: OpenKind) -> None:
    trailing = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    assert open_kind("sdxl", **trailing).variant.name == "base"
    assert open_kind("sdxl", timestep_spacing="trailing", prediction_type="v_prediction").variant.name == "base"


def test_an_sd2_that_does_not_say_what_it_predicts_is_refused(open_kind: OpenKind) -> None:
    with pytest.raises(CheckpointError, match="states no prediction_type") as refusal:
        open_kind("sd2", prediction_type=None)
    assert "v_prediction" in refusal.value.hint


def test_an_assumed_prediction_is_told(open_kind: OpenKind) -> None:
    assert "does not state it" in open_kind("sd1", prediction_type=None).variant.prediction_why
    with pytest.raises(CheckpointError, match="prediction_type 'flow_prediction'"):
        open_kind("sd1", prediction_type="flow_prediction")


@pytest.mark.parametrize(
    ("kind", "guidance", "message"),
    [
        ("sd-turbo", "default = 7.5", "works without guidance"),
        ("lcm", 'mode = "cfg"', "mode = 'cfg' does not fit"),
        ("sd1", 'mode = "embedded"', "its UNet has no time_cond_proj_dim"),
    ],
)
def test_guidance_that_a_checkpoint_cannot_follow_is_refused(
    kind: str, guidance: str, message: str, open_kind: OpenKind
) -> None:
    recipe = parse_recipe(f"schema = 1\n[guidance]\n{guidance}", "my.toml")
    with pytest.raises(RecipeError, match=message):
        sampling_of(open_kind(kind), recipe)


def test_dmd2_has_its_own_timesteps(open_kind: OpenKind) -> None:
    recipe = load_recipe("dmd2-fp16")
    assert recipe.schedule.timesteps == (999, 749, 499, 249)
    assert sampling_of(open_kind("sdxl"), recipe) == Sampling("none", 1.0, 4)


def test_the_manifest_tells_what_the_unet_reads(open_kind: OpenKind) -> None:
    xl, base = conditioning_entry(open_kind("sdxl")), conditioning_entry(open_kind("sd1"))
    assert (xl.text_encoders, xl.time_ids, xl.zeros_for_empty, xl.input_channels) == (2, True, True, 4)
    assert (base.text_encoders, base.time_ids, base.zeros_for_empty, base.input_channels) == (1, False, False, 4)
    told_otherwise = dataclasses.replace(open_kind("sdxl"), settings={"force_zeros_for_empty_prompt": False})
    assert not reads_zeros_for_empty(told_otherwise)
