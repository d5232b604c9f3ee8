"""What a single file of the original code does not say is told by evidence, assumed aloud, or asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusette.checkpoints.checkpoint import DEMO_FOLDER, open_checkpoint
from diffusette.checkpoints.single_file.open import read_single_file
from diffusette.checkpoints.single_file.tokenizer import CLIP
from diffusette.stages.artifacts import Companions
from diffusette.stages.errors import UsageError

from ..ldm import Tensors, ldm_tensors, original_pipeline, write_ldm
from .opening import GIVEN, TOKENIZER, refusal


def test_a_yaml_beside_the_file_states_prediction_factor_and_heads(tensors: Tensors, tmp_path: Path) -> None:
    file = write_ldm(tmp_path / "v.safetensors", tensors)
    (tmp_path / "v.yaml").write_text(
        "model:\n  params:\n    parameterization: v\n    scale_factor: 0.5\n    linear_start: 0.001\n"
        "    linear_end: 0.01\n    unet_config: {params: {num_heads: 4}}\n"
    )
    found = read_single_file(file, GIVEN)
    configs = found.headers.configs
    assert configs["scheduler"]["prediction_type"] == "v_prediction"
    assert (configs["scheduler"]["beta_start"], configs["scheduler"]["beta_end"]) == (0.001, 0.01)
    assert configs["vae"]["scaling_factor"] == 0.5
    assert configs["unet"]["attention_head_dim"] == 4
    assert any("v.yaml" in remark for remark in found.remarks)


@pytest.mark.parametrize(
    ("metadata", "markers", "given", "prediction", "says"),
    [
        ({"modelspec.prediction_type": "v"}, (), None, "v_prediction", "modelspec"),
        ({"modelspec.prediction_type": "epsilon"}, (), None, "epsilon", "modelspec"),
        ({}, ("v_pred",), None, "v_prediction", "marker"),
        ({"modelspec.prediction_type": "epsilon"}, (), "v_prediction", "v_prediction", "--prediction"),
    ],
)
def test_prediction_is_told_by_evidence(
    metadata: dict[str, str], markers: tuple[str, ...], given: str | None, prediction: str, says: str,
    tensors: Tensors, tmp_path: Path,
) -> None:  # fmt: skip
    file = write_ldm(tmp_path / "m.safetensors", tensors | dict.fromkeys(markers, torch.zeros(1)), metadata=metadata)
    found = read_single_file(file, Companions(tokenizer=TOKENIZER, prediction=given))
    assert found.headers.configs["scheduler"]["prediction_type"] == prediction
    assert says in found.prediction_why
    assert f"prediction {prediction} ({found.prediction_why})" in found.remarks


@pytest.mark.parametrize(
    ("kind", "stem", "metadata", "solver"),
    [
        ("sdxl", "sd_xl_turbo_1.0_fp16", {}, "EulerAncestralDiscreteScheduler"),
        ("sd2", "sd_turbo", {}, "EulerDiscreteScheduler"),
        ("sdxl", "sdxl_lightning_4step", {}, "EulerDiscreteScheduler"),
        ("sdxl", "model", {"modelspec.title": "Stable Diffusion XL Turbo"}, "EulerAncestralDiscreteScheduler"),
        ("sd1", "dreamshaper_8LCM", {}, "LCMScheduler"),
    ],
)
def test_a_file_that_is_called_distilled_is_sampled_so(
    kind: str, stem: str, metadata: dict[str, str], solver: str, tmp_path: Path
) -> None:
    """Its shapes are its base's: guided over 20 steps, SDXL-Turbo's single file drew garbage without a word."""
    file = write_ldm(tmp_path / f"{stem}.safetensors", ldm_tensors(original_pipeline(kind)), metadata=metadata)
    found = open_checkpoint(file, companions=Companions(tokenizer=TOKENIZER), survey=False)
    variant = found.variant
    assert found.scheduler["_class_name"] == solver
    assert (variant.guidance_mode, variant.steps, variant.prediction_type) == ("none", 4, "epsilon")
    assert any("in few steps without guidance" in remark for remark in found.remarks)


@pytest.mark.parametrize("stem", ["turbocharged", "sdxl_base", "enlightning"])
def test_a_word_inside_another_says_nothing(stem: str, tmp_path: Path) -> None:
    file = write_ldm(tmp_path / f"{stem}.safetensors", ldm_tensors(original_pipeline("sdxl")))
    assert open_checkpoint(file, companions=Companions(tokenizer=TOKENIZER), survey=False).variant.name == "base"


def test_a_prediction_that_does_not_exist_is_refused(file: Path) -> None:
    with pytest.raises(UsageError, match="epsilonn"):
        open_checkpoint(file, companions=Companions(tokenizer=TOKENIZER, prediction="epsilonn"), survey=False)


def test_clips_vocabulary_is_shipped(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    file = write_ldm(tmp_path / "clip.safetensors", ldm_tensors(original_pipeline("sd1", vocabulary=49408)))
    found = open_checkpoint(file, survey=False)
    assert found.tokenizer == CLIP
    ids = CLIPTokenizer.from_pretrained(found.tokenizer)("a photo of an astronaut riding a horse").input_ids
    # as openai/CLIP's own tokenizer gives them
    assert ids == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 49407]


def test_a_vocabulary_of_its_own_needs_its_tokenizer(file: Path, tmp_path: Path) -> None:
    problem = refusal(file, Companions())
    assert "knows 681 tokens" in problem.what
    assert "--tokenizer" in problem.hint
    assert "49408 tokens, the text encoder knows 681" in refusal(file, Companions(tokenizer=CLIP)).what
    shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    shutil.copy(file, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path / "model.safetensors", survey=False).tokenizer == tmp_path / "tokenizer"


def test_configurations_of_a_diffusers_folder_can_be_given(file: Path, tmp_path: Path) -> None:
    shutil.copytree(DEMO_FOLDER, tmp_path / "demo", ignore=shutil.ignore_patterns("*.safetensors"))
    found = open_checkpoint(file, companions=Companions(config=tmp_path / "demo"), survey=False)
    assert found.components["vae_decoder"].config["scaling_factor"] == 0.40502
