"""A VAE given apart, beside a single file or a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.weights import Weights
from diffusette.stages.artifacts import Companions

from ..ldm import Tensors, ldm_vae, original_pipeline, write_ldm
from .opening import TOKENIZER, refusal


def test_a_vae_apart_replaces_the_one_in_the_file(file: Path, pipeline: Any, tmp_path: Path) -> None:
    other = original_pipeline("sd1").vae
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.25)
    original = write_ldm(tmp_path / "vae-ldm.safetensors", ldm_vae(other, prefix=""))
    other.save_pretrained(tmp_path / "vae")
    places = (original, tmp_path / "vae", tmp_path / "vae/diffusion_pytorch_model.safetensors")
    for place in places:
        found = open_checkpoint(file, companions=Companions(tokenizer=TOKENIZER, vae=place))
        weights = Weights(found.components["vae_decoder"])
        for name in weights.names():
            np.testing.assert_array_equal(weights.read(name), other.state_dict()[name].numpy())
        assert {label for label in found.sources if label.startswith("vae/")}
        np.testing.assert_array_equal(
            Weights(found.components["unet"]).read("conv_in.bias"), pipeline.unet.conv_in.bias.detach()
        )


def test_a_file_without_vae_asks_for_one(tensors: Tensors, file: Path, tmp_path: Path) -> None:
    bare = {name: values for name, values in tensors.items() if not name.startswith("first_stage_model.")}
    small = write_ldm(tmp_path / "bare.safetensors", bare)
    problem = refusal(small)
    assert "without a VAE" in problem.what
    assert "--vae" in problem.hint
    with_vae = open_checkpoint(small, companions=Companions(tokenizer=TOKENIZER, vae=file))
    assert with_vae.components["vae_decoder"].config["scaling_factor"] == 0.18215


def test_a_vae_that_is_none_is_refused(file: Path, tmp_path: Path) -> None:
    wrong = write_ldm(tmp_path / "x.safetensors", {"x": torch.zeros(1)})
    assert "no tensor of a VAE" in refusal(file, Companions(tokenizer=TOKENIZER, vae=wrong)).what
    assert "no such file" in refusal(file, Companions(tokenizer=TOKENIZER, vae=tmp_path / "gone")).what


def test_a_vae_apart_serves_a_diffusers_folder_too(tiny_copy: Path, tmp_path: Path) -> None:
    shutil.move(tiny_copy / "vae", tmp_path / "other")
    found = open_checkpoint(tiny_copy, companions=Companions(vae=tmp_path / "other"))
    assert "vae/config.json" in found.sources
