"""Single files of SD 2.x and SDXL, and of what looks like them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.single_file.open import read_single_file
from diffusette.checkpoints.single_file.tokenizer import CLIP, OPEN_CLIP
from diffusette.export.modules import load
from diffusette.stages.artifacts import Companions
from diffusette.stages.errors import CheckpointError

from ..ldm import ldm_tensors, original_pipeline, write_ldm
from .opening import GIVEN, TOKENIZER, assert_weights_are, refusal


@pytest.mark.parametrize(("kind", "dtype"), [("sd2", torch.float32), ("sdxl", torch.float32), ("sdxl", torch.float16)])
def test_every_weight_of_sd2_and_sdxl_files_is_found_under_todays_name(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    pipeline = original_pipeline(kind)
    file = write_ldm(tmp_path / "model.safetensors", ldm_tensors(pipeline), dtype)
    found = open_checkpoint(file, companions=Companions(tokenizer=TOKENIZER, prediction="v_prediction"))
    assert found.family == kind
    assert ("text_encoder_2" in found.components) == (kind == "sdxl")
    assert_weights_are(found, pipeline, dtype)
    factor = found.components["vae_decoder"].config["scaling_factor"]
    assert factor == {"sd2": 0.18215, "sdxl": 0.13025}[kind]
    if dtype == torch.float32:
        for source in found.components.values():
            load(source)  # checks every name and shape against the module that the derived configuration builds


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_derived_configurations_of_sd2_and_sdxl_are_those_of_the_modules(kind: str, tmp_path: Path) -> None:
    pipeline = original_pipeline(kind)
    file = write_ldm(tmp_path / "model.safetensors", ldm_tensors(pipeline))
    layout = read_single_file(file, Companions(tokenizer=TOKENIZER, prediction="v_prediction"))
    for part in layout.weights:
        module = getattr(pipeline, part)
        for key, value in layout.headers.configs[part].items():
            if key not in ("_class_name", "sample_size", "architectures", "scaling_factor"):
                stated = module.config.to_dict()[key] if part.startswith("text") else module.config[key]
                assert value == (list(stated) if isinstance(stated, tuple) else stated), (part, key)


def test_open_clips_tokenizer_fills_with_token_0() -> None:
    from transformers import CLIPTokenizer

    own, open_clip = (CLIPTokenizer.from_pretrained(folder) for folder in (CLIP, OPEN_CLIP))
    assert (own.pad_token_id, open_clip.pad_token_id) == (49407, 0)
    assert own("a red star").input_ids == open_clip("a red star").input_ids


def test_an_sd2_file_that_does_not_say_what_it_predicts_asks(tmp_path: Path) -> None:
    tensors = ldm_tensors(original_pipeline("sd2"))
    file = write_ldm(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match="nothing in this file says which") as caught:
        read_single_file(file, GIVEN)
    assert "--prediction" in caught.value.hint
    stated = write_ldm(tmp_path / "v.safetensors", tensors, metadata={"modelspec.prediction_type": "v"})
    layout = read_single_file(stated, GIVEN)
    assert layout.headers.configs["scheduler"]["prediction_type"] == "v_prediction"
    assert layout.headers.configs["unet"]["sample_size"] == 96  # 768 pixels


def test_the_refiner_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {
        "model.diffusion_model.out.2.bias": torch.zeros(4),
        "conditioner.embedders.0.model.ln_final.bias": torch.zeros(4),
    }
    assert "the refiner" in refusal(write_ldm(tmp_path / "refiner.safetensors", tensors)).what
