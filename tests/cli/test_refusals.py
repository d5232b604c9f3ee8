"""What cannot be converted is refused by name within seconds, from headers: exit 4, and nothing is written."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ..adapters import random_lora
from ..kinds import write_kind
from ..ldm import ldm_tensors, original_pipeline, write_ldm
from ..models import lone_safetensors, malicious_pickle, truncate, write_tiny_sd1
from ..test_imports import HEAVY
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


def pickled(*names: str) -> Callable[[Path], list[str | Path]]:
    def make(folder: Path) -> list[str | Path]:
        torch.save({"state_dict": {name: torch.zeros(2) for name in names}}, folder / "model.pt")
        return [folder / "model.pt"]

    return make


def cut_archive(folder: Path) -> list[str | Path]:
    file = pickled("model.diffusion_model.input_blocks.0.0.weight")(folder)[0]
    truncate(Path(file), 64)
    return [file]


def disguised_pickle(folder: Path) -> list[str | Path]:
    malicious_pickle(folder / "model.safetensors", folder / "ran")
    return [folder / "model.safetensors"]


def gguf(folder: Path) -> list[str | Path]:
    """The header of one key that llama.cpp's writer begins with."""
    texts = [struct.pack("<Q", len(text)) + text for text in (b"general.architecture", b"llama")]
    (folder / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + texts[0] + b"\x08\0\0\0" + texts[1])
    return [folder / "model.gguf"]


def without_index(folder: Path) -> list[str | Path]:
    (write_tiny_sd1(folder / "model") / "model_index.json").unlink()
    return [folder / "model"]


def adapter_of_sdxl(folder: Path) -> list[str | Path]:
    """As kohya's trainer names it: the original UNet's blocks."""
    module = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    shapes = {"lora_down": (4, 2048), "lora_up": (640, 4)}
    save_file({f"{module}.{n}.weight": torch.zeros(*s) for n, s in shapes.items()}, folder / "xl.safetensors")
    return ["demo", "--adapter", folder / "xl.safetensors"]


def adapter_of_sd1(folder: Path) -> list[str | Path]:
    """On a single file, whose names take PyTorch to translate."""
    file = write_ldm(folder / "xl.safetensors", ldm_tensors(original_pipeline("sdxl")))
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v"
    shapes = {"lora_down": (4, 768), "lora_up": (320, 4)}
    save_file({f"{module}.{n}.weight": torch.zeros(*s) for n, s in shapes.items()}, folder / "one.safetensors")
    return [file, "--adapter", folder / "one.safetensors"]


def adapter_that_fits_in_part(folder: Path) -> list[str | Path]:
    write_kind("sd1", folder / "model")
    keys = ("down_blocks_0_attentions_0", "down_blocks_7_attentions_0")
    modules = [f"lora_unet_{key}_transformer_blocks_0_attn1_to_q" for key in keys]
    state = {
        f"{m}.lora_{n}.weight": torch.zeros(s) for m in modules for n, s in {"down": (4, 16), "up": (16, 4)}.items()
    }
    save_file(state, folder / "part.safetensors")
    return [folder / "model", "--adapter", folder / "part.safetensors"]


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
    "DiT, pickled": (
        pickled("x_embedder.proj.weight", "blocks.0.attn.qkv.weight"),
        "a single-file diffusion transformer",
    ),
    "AnimateDiff's motion modules, pickled": (
        pickled("module.down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"),
        "a single-file video model",
    ),
    "GPT-2, one file": (huge("h.0.attn.c_attn.weight"), "a language model"),
    "T5, one file": (huge("encoder.block.0.layer.0.SelfAttention.q.weight"), "a text encoder alone"),
    "language model, GGUF": (gguf, "a GGUF file (llama.cpp, stable-diffusion.cpp) of the architecture 'llama'"),
    "archive that is cut short": (cut_archive, "without its end: cut short, or damaged"),
    "pickle with another name": (disguised_pickle, "a pickle that runs code"),
    "folder without its index": (without_index, "of a diffusers folder, without its model_index.json"),
    "LoRA of SDXL on SD 1.x": (adapter_of_sdxl, "reads text of 2048 (Stable Diffusion XL) channels"),
    "LoRA of SD 1.x on SDXL": (adapter_of_sd1, "reads text of 768 (Stable Diffusion 1.x) channels"),
    "LoRA of which a part fits": (adapter_that_fits_in_part, "only 1 of its 2 modules match"),
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


_REFUSE_ALL = """
import json, os, sys
from diffusette.cli import run
started = []
sys.addaudithook(lambda event, words: started.append(str(words[1])) if event == "subprocess.Popen" else None)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
told = []
for words in json.load(sys.stdin):
    code = run(["convert", *words])
    told.append([code, sorted({name.split(".")[0] for name in sys.modules}), [*started]])
print(json.dumps(told))
"""


def test_no_refusal_loads_a_heavy_package_or_starts_a_process(tmp_path: Path) -> None:
    """The reason why a refusal takes half a second of processor time, told without a clock."""
    given = []
    for number, (make, _) in enumerate(CASES.values()):
        (tmp_path / f"{number}").mkdir()
        given.append([*map(str, make(tmp_path / f"{number}")), "-o", str(tmp_path / "out")])
    done = subprocess.run(
        [sys.executable, "-P", "-c", _REFUSE_ALL], input=json.dumps(given), capture_output=True, text=True, check=True
    )
    for case, (code, modules, started) in zip(CASES, json.loads(done.stdout), strict=True):
        assert (code, set(modules) & HEAVY, started) == (4, set(), []), case
