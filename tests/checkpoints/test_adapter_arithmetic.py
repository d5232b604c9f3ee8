"""Kinds of adapters that PEFT lacks, computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusette.checkpoints.weights import Weights
from safetensors.torch import save_file

from ..adapters import ATTENTION, random_lora
from .adapting import CONV, FLAT, FLAT_QUERY, FLOOR_DB, QUERY, only, opened, snr_db


def test_a_tucker_lora_is_its_three_convolutions_one_after_the_other(tiny_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    down, mid, up = torch.randn(3, 16, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(16, 3, 1, 1)
    state = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.5)}
    save_file({f"{FLAT}.{k}": v for k, v in state.items()}, tmp_path / "t.safetensors")
    before, after = only(tiny_folder, tmp_path / "t.safetensors", f"{CONV}.weight", 2.0)
    x = torch.randn(1, 16, 6, 6)
    conv = torch.nn.functional.conv2d
    live = conv(x, before, padding=1) + 2.0 * 1.5 / 3 * conv(conv(conv(x, down), mid, padding=1), up)
    assert snr_db(live, conv(x, after, padding=1)) > FLOOR_DB


def test_every_module_of_a_kohya_lora_has_a_rank_and_an_alpha_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    """diffusers takes one alpha for all modules of attention, so the live side is what kohya's trainer computes."""
    torch.manual_seed(0)
    of_module = {QUERY: (2, 1.0), QUERY.replace("to_q", "to_v"): (8, 6.0)}
    state: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for module, (rank, alpha) in of_module.items():
        down, up = torch.randn(rank, 16), torch.randn(16, rank)
        stored = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
        state |= {f"lora_unet_{module.replace('.', '_')}.{k}": v for k, v in stored.items()}
        expected[module] = 0.8 * alpha / rank * up @ down
    save_file(state, tmp_path / "mixed.safetensors")
    for module, change in expected.items():
        before, after = only(tiny_folder, tmp_path / "mixed.safetensors", f"{module}.weight", 0.8)
        assert snr_db(before + change, after) > FLOOR_DB


@pytest.mark.parametrize("axis", [0, 1])
def test_kohyas_dora_scale_weighs_rows_or_columns(axis: int, tiny_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    down, up = torch.randn(4, 16), torch.randn(16, 4)
    magnitude = torch.rand(16, 1) + 0.5 if axis == 0 else torch.rand(1, 16) + 0.5
    state = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0), "dora_scale": magnitude}
    save_file({f"{FLAT_QUERY}.{k}": v for k, v in state.items()}, tmp_path / "d.safetensors")
    before, after = only(tiny_folder, tmp_path / "d.safetensors", f"{QUERY}.weight")
    changed = before + 0.5 * up @ down
    expected = magnitude * changed / changed.norm(dim=1 - axis, keepdim=True)
    assert snr_db(expected, after) > FLOOR_DB


@pytest.mark.parametrize("prefix", ["lora_unet_", "oft_unet_"])  # LyCORIS', kohya's
def test_oft_blocks_turn_blocks_of_outputs(prefix: str, tiny_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = torch.randn(4, 4, 4) * 0.2
    state = {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}
    flat = FLAT_QUERY.replace("lora_unet_", prefix)
    save_file({f"{flat}.{k}": v for k, v in state.items()}, tmp_path / "o.safetensors")
    before, after = only(tiny_folder, tmp_path / "o.safetensors", f"{QUERY}.weight")
    turns = []
    for block in blocks.double():
        skew = block - block.T
        turns.append((torch.eye(4) + skew) @ torch.linalg.inv(torch.eye(4) - skew))
    whole = torch.block_diag(*turns)
    assert snr_db(torch.eye(16).double(), whole @ whole.T) > FLOOR_DB  # a rotation keeps lengths
    assert snr_db(whole.T @ before.double(), after.double()) > FLOOR_DB
    _, half = only(tiny_folder, tmp_path / "o.safetensors", f"{QUERY}.weight", 0.5)
    assert snr_db((before + after) / 2, half) > FLOOR_DB


def test_whole_differences_of_weight_and_bias_are_added(tiny_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    diff, bias = torch.randn(16, 16, 3, 3), torch.randn(16)
    save_file({f"{FLAT}.diff": diff, f"{FLAT}.diff_b": bias}, tmp_path / "f.safetensors")
    for name, values in (("weight", diff), ("bias", bias)):
        before, after = only(tiny_folder, tmp_path / "f.safetensors", f"{CONV}.{name}", 0.5)
        assert snr_db(before + 0.5 * values, after) > FLOOR_DB


def test_half_precision_weights_keep_the_change_in_float32(tiny_folder: Path, tmp_path: Path) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None, torch_dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half")
    state = random_lora(pipeline.unet, ATTENTION, "lora_unet_")
    save_file({k: v * 1e-3 for k, v in state.items() if "alpha" not in k}, tmp_path / "small.safetensors")
    found = opened(tmp_path / "half", (tmp_path / "small.safetensors", 1.0)).components["unet"]
    weights = Weights(found)
    assert weights.spec(f"{QUERY}.weight")[0] == "float32"
    assert weights.spec(f"{CONV}.weight")[0] == "float16"
    moved = weights.read(f"{QUERY}.weight") - weights.read_unchanged(f"{QUERY}.weight").astype(np.float32)
    assert 0 < np.abs(moved).max() < 1e-5  # below a half's resolution
