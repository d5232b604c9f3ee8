"""Files and folders that are no checkpoint are called what they are, from their headers."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ..models import (
    UNET_WEIGHTS,
    edit_json,
    lone_safetensors,
    malicious_pickle,
)
from .opening import refusal_of


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.safetensors"])
def test_a_pickle_given_as_the_checkpoint_is_refused_and_runs_nothing(name: str, tmp_path: Path) -> None:
    malicious_pickle(tmp_path / name, tmp_path / "ran")
    assert "pickle" in refusal_of(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.gguf", b"GGUF\x03\x00\x00\x00", "a GGUF file"),
        ("model.onnx", b"\x08\x0a\x12\x07pytorch", "an ONNX model"),
        ("model.safetensors", b"", "an empty file"),
        ("model.safetensors", b"<!doctype html>", "an HTML page"),
        ("model.safetensors", b"no weights here", "damaged safetensors file"),
        ("model.tflite", b"\x1c\x00\x00\x00TFL3", "a TensorFlow Lite model"),
        ("notes.txt", b"hello", "neither safetensors nor any format known here"),
    ],
)
def test_a_file_of_another_format_is_called_what_it_is(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refusal_of(tmp_path / name)


def test_a_file_in_a_folder_without_index_is_called_what_it_is(tmp_path: Path) -> None:
    lone_safetensors(tmp_path / "pytorch_lora_weights.safetensors", ("unet.x.lora_A.weight",))
    assert "a LoRA or LyCORIS adapter" in refusal_of(tmp_path)


def test_an_adapter_of_any_kind_of_pefts_is_called_an_adapter(tmp_path: Path) -> None:
    """OFT's was "66 tensors of no model known here"."""
    key = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q."
    for kind in ("oft_R.weight", "boft_R", "hra_u", "vera_lambda_d"):
        lone_safetensors(tmp_path / "adapter_model.safetensors", (key + kind,))
        assert "a LoRA or LyCORIS adapter" in refusal_of(tmp_path)


def test_a_folder_of_one_model_is_called_what_it_is(tiny_folder: Path) -> None:
    assert "a UNet alone (class UNet2DConditionModel)" in refusal_of(tiny_folder / "unet")
    assert "a VAE alone" in refusal_of(tiny_folder / "vae")
    assert "a text encoder alone" in refusal_of(tiny_folder / "text_encoder")


def test_unknown_tensors_are_shown(tmp_path: Path) -> None:
    assert "2 tensors of no known model (one, two" in refusal_of(
        lone_safetensors(tmp_path / "x.safetensors", ("one", "two"))
    )


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        (
            "model.diffusion_model.input_blocks.0.0.weight",
            "a UNet of the original code without its text encoder",
        ),
        ("model.layers.0.mlp.up_proj.weight", "a language model"),
        ("lora_unet_mid_block.lora_down.weight", "a LoRA"),
    ],
)
def test_a_huge_lone_file_is_refused_from_its_header_within_a_second(tensor: str, name: str, tmp_path: Path) -> None:
    file = lone_safetensors(tmp_path / "huge.safetensors", (tensor,), huge=True)
    start = time.perf_counter()
    assert name in refusal_of(file)
    assert time.perf_counter() - start < 1  # s; reading these 8 GB takes several


def test_an_unsupported_folder_is_refused_before_its_weights_are_looked_at(
    tiny_copy: Path, no_weights_read: None
) -> None:
    edit_json(tiny_copy / "model_index.json", {"transformer": ["diffusers", "SD3Transformer2DModel"]})
    (tiny_copy / UNET_WEIGHTS).write_bytes(b"no weights at all")
    assert "Stable Diffusion 3 (class SD3Transformer2DModel)" in refusal_of(tiny_copy)
