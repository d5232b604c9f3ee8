"""Single files of the original code, written by `tests.ldm` in the real key layout, open as what they were."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusette.checkpoints.checkpoint import DEMO_FOLDER, open_checkpoint
from diffusette.checkpoints.weights import Weights
from diffusette.export.modules import load
from diffusette.stages.artifacts import Companions

from ..ldm import Tensors, ldm_tensors, with_ema, write_ldm
from .opening import GIVEN, TOKENIZER, assert_weights_are, refusal


def test_every_weight_of_an_sd1_file_is_found_under_todays_name(file: Path, pipeline: Any) -> None:
    found = open_checkpoint(file, companions=GIVEN)
    assert (found.family, found.name) == ("sd1", "model")
    assert_weights_are(found, pipeline)


def test_derived_configurations_build_the_modules_that_the_weights_fit(file: Path) -> None:

    for source in open_checkpoint(file, companions=GIVEN, survey=False).components.values():
        load(source)  # checks every name and shape against the module


def test_derived_configurations_are_those_of_the_module_that_was_saved(file: Path, pipeline: Any) -> None:
    components = open_checkpoint(file, companions=GIVEN, survey=False).components
    for name, module in (("unet", pipeline.unet), ("vae_decoder", pipeline.vae)):
        for key, value in components[name].config.items():
            if key not in ("_class_name", "sample_size"):
                stated = module.config[key]
                assert value == (list(stated) if isinstance(stated, tuple) else stated), key
    for key, value in components["text_encoder"].config.items():
        if key != "architectures":
            assert value == getattr(pipeline.text_encoder.config, key), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_as_stored(dtype: torch.dtype, pipeline: Any, tmp_path: Path) -> None:
    file = write_ldm(tmp_path / "half.safetensors", ldm_tensors(pipeline), dtype)
    found = open_checkpoint(file, companions=GIVEN)
    assert {part.dtype for part in found.components.values()} == {str(dtype).removeprefix("torch.")}
    assert_weights_are(found, pipeline, dtype)


def test_averaged_weights_are_left_out_unless_asked_for(tensors: Tensors, pipeline: Any, tmp_path: Path) -> None:
    file = write_ldm(tmp_path / "ema.safetensors", with_ema(tensors, lambda values: values + 1))
    plain = open_checkpoint(file, companions=GIVEN)
    averaged = open_checkpoint(file, companions=Companions(tokenizer=TOKENIZER, ema=True))
    assert_weights_are(plain, pipeline)
    name = "conv_in.weight"
    unets = [Weights(each.components["unet"]).read(name) for each in (plain, averaged)]
    np.testing.assert_array_equal(unets[1], unets[0] + 1)
    assert any("(EMA) are left out" in remark for remark in plain.remarks)
    assert plain.components["text_encoder"].digest == averaged.components["text_encoder"].digest
    assert plain.components["unet"].digest != averaged.components["unet"].digest


def test_averaged_weights_that_are_not_there_are_not_invented(file: Path) -> None:
    assert "no averaged weights" in refusal(file, Companions(tokenizer=TOKENIZER, ema=True)).what


def test_what_is_assumed_is_said(file: Path) -> None:
    said = " ".join(open_checkpoint(file, companions=GIVEN, survey=False).remarks)
    for words in ("8 attention heads", "VAE scaling 0.18215", "prediction epsilon (assumed", "512 pixels"):
        assert words in said


def test_widths_that_the_original_code_cannot_have_need_configurations(pipeline: Any, tmp_path: Path) -> None:
    odd = {name: values[: len(values) - 8] if ".out_layers.3." in name else values
           for name, values in ldm_tensors(pipeline).items()}  # fmt: skip
    problem = refusal(write_ldm(tmp_path / "odd.safetensors", odd))
    assert "do not divide into" in problem.what
    assert "--config" in problem.hint


def test_sources_hold_no_path_of_this_machine(file: Path) -> None:
    found = open_checkpoint(file, companions=GIVEN)
    assert set(found.sources) == {"model.safetensors"} | {f"tokenizer/{f.name}" for f in TOKENIZER.iterdir()}
    assert all(len(digest) == 64 for digest in found.sources.values())


def test_equal_content_has_one_digest_in_any_file(file: Path, tensors: Tensors, tmp_path: Path) -> None:
    changed = dict(tensors)
    name = "model.diffusion_model.out.2.bias"
    changed[name] = changed[name] + 1
    one = open_checkpoint(file, companions=GIVEN)
    other = open_checkpoint(write_ldm(tmp_path / "fine-tune.safetensors", changed), companions=GIVEN)
    same = {part for part in one.components if one.components[part].digest == other.components[part].digest}
    assert same == {"text_encoder", "vae_decoder", "vae_encoder"}
    assert one.digest != other.digest


def test_damage_is_refused_within_seconds(file: Path, tensors: Tensors, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    missing = write_ldm(tmp_path / "missing.safetensors", {n: v for n, v in tensors.items() if ".out.2." not in n})
    encoderless = write_ldm(
        tmp_path / "unet.safetensors", {n: v for n, v in tensors.items() if not n.startswith("cond_stage_model.")}
    )
    started = time.perf_counter()
    assert "weights end at byte" in refusal(cut).what
    assert "out.2.weight" in refusal(missing).what
    assert "without its text encoder" in refusal(encoderless).what
    assert time.perf_counter() - started < 5
    extra = tensors | {"model.diffusion_model.input_blocks.1.7.weight": torch.zeros(4)}
    assert "have no place in diffusers' model" in refusal(write_ldm(tmp_path / "extra.safetensors", extra)).what


def test_the_demos_twin_is_known_by_its_text_encoder(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    class Twin:
        unet = UNet2DConditionModel.from_pretrained(DEMO_FOLDER / "unet")
        vae = AutoencoderKL.from_pretrained(DEMO_FOLDER / "vae")
        text_encoder = CLIPTextModel.from_pretrained(DEMO_FOLDER / "text_encoder")

    demo = open_checkpoint("demo")
    twin = open_checkpoint(write_ldm(tmp_path / "twin.safetensors", ldm_tensors(Twin)))
    assert {n: part.digest for n, part in twin.components.items()} == {
        n: part.digest for n, part in demo.components.items()
    }
    assert twin.digest == demo.digest
