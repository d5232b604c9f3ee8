"""Adapters merged before export do what they do live in PyTorch, whoever wrote their file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusette.checkpoints.checkpoint import DEMO_FOLDER, open_checkpoint
from diffusette.checkpoints.weights import Weights
from diffusette.export.modules import load
from diffusette.stages.artifacts import Checkpoint, Companions
from safetensors.torch import save_file

from ..adapters import ATTENTION, CONFIGS, WITH_CONVOLUTIONS, adapt, random_lora, save_peft
from ..ldm import ldm_tensors, original_pipeline, unet_name, write_ldm
from .adapting import FLOOR_DB, live_and_merged, opened, snr_db


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_merged_peft_adapter_is_the_live_one(kind: str, unet: Any, tiny_folder: Path, tmp_path: Path) -> None:
    live = adapt(unet, kind)
    place = save_peft(live, kind, tmp_path / kind)
    assert live_and_merged(tiny_folder, ((place, 1.0),), live) > FLOOR_DB


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_a_scale_is_the_one_that_peft_sets(kind: str, unet: Any, tiny_folder: Path, tmp_path: Path) -> None:
    live = adapt(unet, kind)
    place = save_peft(live, kind, tmp_path / kind)
    for module in live.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.4)
    assert live_and_merged(tiny_folder, ((place, 0.4),), live) > FLOOR_DB


def with_diffusers(folder: Path, *states: tuple[dict[str, torch.Tensor], float]) -> Any:
    """diffusers' own pipeline with LoRAs loaded by its own loader."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for number, (state, _) in enumerate(states):
        pipeline.load_lora_weights(dict(state), adapter_name=f"a{number}")
    pipeline.set_adapters([f"a{n}" for n in range(len(states))], [scale for _, scale in states])
    return pipeline


def test_two_kohya_loras_are_those_that_diffusers_loads(unet: Any, tiny_folder: Path, tmp_path: Path) -> None:
    one = random_lora(unet, WITH_CONVOLUTIONS, "lora_unet_")
    two = random_lora(unet, ATTENTION, "lora_unet_", rank=2, alpha=None, seed=9)
    for name, state in (("one", one), ("two", two)):
        save_file(state, tmp_path / f"{name}.safetensors")
    live = with_diffusers(tiny_folder, (one, 0.7), (two, -0.5)).unet
    given = ((tmp_path / "one.safetensors", 0.7), (tmp_path / "two.safetensors", -0.5))
    assert live_and_merged(tiny_folder, given, live) > FLOOR_DB


def test_a_kohya_lora_of_the_text_encoder_is_merged_there(tiny_folder: Path, tmp_path: Path) -> None:
    encoder = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None).text_encoder
    state = random_lora(encoder, r".*\.(q_proj|fc1|out_proj)", "lora_te_", text=True)
    save_file(state, tmp_path / "te.safetensors")
    ids = torch.arange(77)[None]
    with torch.no_grad():
        live = with_diffusers(tiny_folder, (state, 1.0)).text_encoder(ids).last_hidden_state
        merged = load(opened(tiny_folder, (tmp_path / "te.safetensors", 1.0)).components["text_encoder"])(ids)
    assert snr_db(live, merged) > FLOOR_DB


def kohya_to(style: Callable[[str], str], state: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, Any]:
    """A kohya LoRA without alpha, its keys written by `style` (which takes the dotted module's name and the end)."""
    return {style(f"{names[k.split('.')[0]]}|{k.split('.')[1]}"): v for k, v in state.items()}


STYLES: dict[str, Callable[[str], str]] = {
    "diffusers": lambda k: "unet." + k.replace("|lora_down", ".lora_A.weight").replace("|lora_up", ".lora_B.weight"),
    "diffusers 0.2x": lambda k: (
        "unet." + k.replace("|lora_down", ".lora.down.weight").replace("|lora_up", ".lora.up.weight")
    ),
    "attention processors": lambda k: (
        "unet."
        + k.replace("to_out.0", "to_out")
        .replace("attn1.", "attn1.processor.")
        .replace("attn2.", "attn2.processor.")
        .replace("|lora_", "_lora.")
        + ".weight"
    ),
    "peft": lambda k: (
        "base_model.model."
        + k.replace("|lora_down", ".lora_A.default.weight").replace("|lora_up", ".lora_B.default.weight")
    ),
}


@pytest.mark.parametrize("style", list(STYLES))
def test_every_key_style_is_the_same_adapter(style: str, unet: Any, tiny_folder: Path, tmp_path: Path) -> None:
    state = random_lora(unet, ATTENTION, "lora_unet_", alpha=None)
    names = {"lora_unet_" + name.replace(".", "_"): name for name, _ in unet.named_modules()}
    save_file(state, tmp_path / "kohya.safetensors")
    save_file(kohya_to(STYLES[style], state, names), tmp_path / "other.safetensors")
    places = [tmp_path / f"{name}.safetensors" for name in ("kohya", "other")]
    a, b = (Weights(opened(tiny_folder, (place, 1.0)).components["unet"]) for place in places)
    for name in a.names():
        np.testing.assert_array_equal(a.read(name), b.read(name), err_msg=name)


def sgm(name: str) -> str:
    """kohya's name of a module of SDXL's UNet, which it trains under the original names."""
    path, _, _ = unet_name(f"{name}.weight", layers=1, attention_up={0}).rpartition(".")
    return "lora_unet_" + path.replace(".", "_")


def test_a_kohya_lora_of_sdxl_is_matched_through_the_original_names(tmp_path: Path) -> None:
    pipeline = original_pipeline("sdxl")
    file = write_ldm(tmp_path / "model.safetensors", ldm_tensors(pipeline))
    generator = torch.Generator().manual_seed(5)
    wanted = (
        rf"({ATTENTION}|.*\.(conv1|conv_shortcut|time_emb_proj)|.*samplers\.0\.conv|conv_in|conv_out|add_embedding\..*)"
    )
    dotted: dict[str, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, layer in pipeline.unet.named_modules():
        if re.fullmatch(wanted, name) and hasattr(layer, "weight"):
            out, into, *kernel = layer.weight.shape
            down = torch.randn(2, into, *kernel, generator=generator)
            up = torch.randn(out, 2, *[1] * len(kernel), generator=generator)
            dotted |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
            state |= {f"{sgm(name)}.lora_down.weight": down, f"{sgm(name)}.lora_up.weight": up}
    encoders = {"lora_te1_": pipeline.text_encoder, "lora_te2_": pipeline.text_encoder_2}
    for prefix, encoder in encoders.items():
        state |= random_lora(encoder, r".*\.(q_proj|fc1)", prefix, text=True)
    save_file(state, tmp_path / "kohya.safetensors")
    save_file(dotted, tmp_path / "diffusers.safetensors")

    def components(name: str) -> Checkpoint:
        given = Companions(tokenizer=DEMO_FOLDER / "tokenizer", adapters=((tmp_path / name, 1.0),))
        return open_checkpoint(file, companions=given, survey=False)

    kohya = components("kohya.safetensors")
    one, other = (Weights(each.components["unet"]) for each in (kohya, components("diffusers.safetensors")))
    changed = {change.parameter for change in kohya.components["unet"].adapted}
    assert len(changed) == len(dotted) // 2
    for name in changed:
        np.testing.assert_array_equal(one.read(name), other.read(name), err_msg=name)
    assert kohya.components["text_encoder"].adapted
    assert kohya.components["text_encoder_2"].adapted
    # the first encoder's last layer is not part of the model: its two modules are told, not refused
    assert any("also changes 2 modules that nothing computes with" in remark for remark in kohya.remarks)
