"""What cannot be converted is refused by name within seconds, from headers: exit 4, and nothing is written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ..adapters import random_lora
from ..models import lone_safetensors, truncate, write_tiny_sd1
from .conftest import Command

SECONDS = 5.0


def huge(name: str) -> Callable[[Path], list[str | Path]]:
    """A lone file of 8 GB, of which only the header exists."""

    def make(folder: Path) -> list[str | Path]:
        return [lone_safetensors(folder / "model.safetensors", (name,), huge=True)]

    return make


def pipeline(kind: str, **parts: str) -> Callable[[Path], list[str | Path]]:
    """A diffusers folder of which the index and configurations exist."""

    def make(folder: Path) -> list[str | Path]:
        index = {"_class_name": kind, **{part: ["diffusers", name] for part, name in parts.items()}}
        (folder / "model_index.json").write_text(json.dumps(index))
        for part, name in parts.items():
            (folder / part).mkdir()
            (folder / part / "config.json").write_text(json.dumps({"_class_name": name}))
        return [folder]

    return make


def language_model(folder: Path) -> list[str | Path]:
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 4096}))
    return [folder]


def lora_as_checkpoint(folder: Path) -> list[str | Path]:
    save_file({"lora_unet_mid_block_conv.lora_up.weight": torch.zeros(4, 4)}, folder / "lora.safetensors")
    return [folder / "lora.safetensors"]


def mismatched_adapter(folder: Path) -> list[str | Path]:
    other = torch.nn.ModuleDict({"to_q": torch.nn.Linear(320, 320)})
    save_file(random_lora(other, "to_q", "lora_unet_double_blocks_0_"), folder / "flux.safetensors")
    return ["demo", "--adapter", folder / "flux.safetensors"]


def mismatched_controlnet(folder: Path) -> list[str | Path]:
    """That of Stable Diffusion 2, for another checkpoint."""
    config = {"_class_name": "ControlNetModel", "cross_attention_dim": 1024, "block_out_channels": [320, 640]}
    (folder / "config.json").write_text(json.dumps({**config, "down_block_types": ["DownBlock2D"] * 2}))
    lone_safetensors(folder / "diffusion_pytorch_model.safetensors", ("conv_in.weight",), huge=True)
    return ["demo", "--controlnet", folder]


def controlnet_as_checkpoint(folder: Path) -> list[str | Path]:
    return mismatched_controlnet(folder)[2:]


def truncated_shard(folder: Path) -> list[str | Path]:
    write_tiny_sd1(folder / "sharded", max_shard_size="60KB")
    truncate(sorted((folder / "sharded/unet").glob("*.safetensors"))[1], 64)
    return [folder / "sharded"]


CASES: dict[str, tuple[Callable[[Path], list[str | Path]], str]] = {
    "Flux, one file": (huge("model.diffusion_model.double_blocks.0.img_attn.proj.weight"), "Flux"),
    "another DiT, one file": (huge("model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"), "transformer"),
    "PixArt, folder": (pipeline("PixArtSigmaPipeline", transformer="PixArtTransformer2DModel"), "PixArt"),
    "video model, one file": (huge("model.diffusion_model.patchify_proj.weight"), "video model"),
    "video model, folder": (
        pipeline("StableVideoDiffusionPipeline", unet="UNetSpatioTemporalConditionModel"),
        "video model",
    ),
    "language model, one file": (huge("model.layers.0.mlp.up_proj.weight"), "a language model"),
    "language model, folder": (language_model, "a language model"),
    "LoRA as a checkpoint": (lora_as_checkpoint, "a LoRA"),
    "mismatched adapter": (mismatched_adapter, "nothing of it matches"),
    "mismatched ControlNet": (mismatched_controlnet, "cross_attention_dim is 1024, that of the UNet is"),
    "ControlNet as a checkpoint": (controlnet_as_checkpoint, "a ControlNet alone"),
    "truncated shard": (truncated_shard, "weights end at byte"),
}


def test_two_controlnets_are_one_too_many(tmp_path: Path, command: Command) -> None:
    answer = command("convert", "demo", "--controlnet", "one", "--controlnet", "other", "-o", tmp_path / "out")
    assert answer.code == 2
    assert "--controlnet was given 2 times (one, other)" in answer.err


@pytest.mark.parametrize("case", list(CASES))
def test_it_is_refused_by_name_in_seconds(case: str, tmp_path: Path, command: Command) -> None:
    make, words = CASES[case]
    (tmp_path / "made").mkdir()
    given = make(tmp_path / "made")
    started = time.perf_counter()
    answer = command("convert", *given, "-o", tmp_path / "out")
    assert time.perf_counter() - started < SECONDS
    assert answer.code == 4, answer.err
    assert words in " ".join(answer.err.split())
    assert not (tmp_path / "out").exists()
