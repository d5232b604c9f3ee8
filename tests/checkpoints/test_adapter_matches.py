"""What an adapter does to a checkpoint is reported, and what does not match is refused, whole and by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusette.checkpoints.adapters.movement import MeasureMovement
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.stages.artifacts import Companions
from diffusette.stages.errors import CheckpointError
from safetensors.torch import save_file

from ..adapters import ATTENTION, random_lora
from .adapting import FLAT_QUERY, QUERY, opened


def refusal(folder: Path, place: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        opened(folder, (place, 1.0))
    assert caught.value.exit_code == 4
    return caught.value


def test_an_adapter_of_which_only_a_part_matches_is_refused_with_the_rest(
    unet: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    state = random_lora(unet, ATTENTION, "lora_unet_")
    state["lora_unet_down_blocks_7_attn1_to_q.lora_down.weight"] = torch.zeros(4, 16)
    state["lora_unet_down_blocks_7_attn1_to_q.lora_up.weight"] = torch.zeros(16, 4)
    save_file(state, tmp_path / "part.safetensors")
    problem = refusal(tiny_folder, tmp_path / "part.safetensors").what
    assert "without a match: lora_unet_down_blocks_7_attn1_to_q" in problem
    assert "only " in problem


def test_an_adapter_of_another_family_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    state = {f"transformer.single_transformer_blocks.0.attn.to_q.lora_{s}.weight": torch.zeros(4, 4) for s in "AB"}
    save_file(state, tmp_path / "flux.safetensors")
    assert "nothing of it matches" in refusal(tiny_folder, tmp_path / "flux.safetensors").what


def test_an_adapter_for_another_width_is_refused_from_its_header(tiny_folder: Path, tmp_path: Path) -> None:
    save_file(
        {f"{FLAT_QUERY}.lora_down.weight": torch.zeros(4, 320), f"{FLAT_QUERY}.lora_up.weight": torch.zeros(320, 4)},
        tmp_path / "wide.safetensors",
    )
    assert "made for a weight of 102400 values" in refusal(tiny_folder, tmp_path / "wide.safetensors").what


def test_what_is_no_adapter_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    assert "no such file" in refusal(tiny_folder, tmp_path / "gone.safetensors").what
    whole = tiny_folder / "unet/diffusion_pytorch_model.safetensors"
    assert "belong to no known kind of adapter" in refusal(tiny_folder, whole).what
    save_file({f"{FLAT_QUERY}.oft_r": torch.zeros(4, 4, 4)}, tmp_path / "old.safetensors")
    assert "before 0.16" in refusal(tiny_folder, tmp_path / "old.safetensors").what
    save_file({f"{FLAT_QUERY}.oft_blocks": torch.zeros(2, 4, 4, 4)}, tmp_path / "boft.safetensors")
    assert "BOFT as LyCORIS stores it" in refusal(tiny_folder, tmp_path / "boft.safetensors").what
    save_file({f"{FLAT_QUERY}.lora_down.weight": torch.zeros(4, 16)}, tmp_path / "half.safetensors")
    assert "has only down" in refusal(tiny_folder, tmp_path / "half.safetensors").what


def test_an_adapter_that_was_never_trained_is_said_to_change_nothing(
    unet: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    state = {k: v * (0 if "lora_up" in k else 1) for k, v in random_lora(unet, ATTENTION, "lora_unet_").items()}
    save_file(state, tmp_path / "zero.safetensors")
    source = opened(tiny_folder, (tmp_path / "zero.safetensors", 1.0)).components["unet"]
    with pytest.raises(CheckpointError, match="change none of the"):
        MeasureMovement(source).run(tmp_path)


def test_every_weight_is_reported_with_how_far_it_moved(unet: Any, tiny_folder: Path, tmp_path: Path) -> None:
    state = random_lora(unet, ATTENTION, "lora_unet_")
    save_file(state, tmp_path / "a.safetensors")
    source = opened(tiny_folder, (tmp_path / "a.safetensors", 1.0)).components["unet"]
    movement = MeasureMovement(source).run(tmp_path)
    moved = movement.read()
    assert len(moved) == len(state) // 3
    before = unet.state_dict()[f"{QUERY}.weight"]
    delta = 2.0 / 4 * state[f"{FLAT_QUERY}.lora_up.weight"] @ state[f"{FLAT_QUERY}.lora_down.weight"]
    assert moved[f"{QUERY}.weight"] == pytest.approx(float(delta.norm() / before.norm()), rel=1e-5)
    assert f"moved {len(moved)} weights of unet" in movement.summary()


def test_digests_cover_content_and_scale_and_nothing_else(unet: Any, tiny_folder: Path, tmp_path: Path) -> None:
    state = random_lora(unet, ATTENTION, "lora_unet_")
    save_file(state, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors")
    save_file({k: v * 1.01 for k, v in state.items()}, tmp_path / "c.safetensors")

    def digests(*adapters: tuple[str, float]) -> tuple[str, str]:
        given = tuple((tmp_path / f"{name}.safetensors", scale) for name, scale in adapters)
        found = open_checkpoint(tiny_folder, companions=Companions(adapters=given))
        return found.components["unet"].digest, found.components["text_encoder"].digest

    plain, base = digests(), digests(("a", 1.0))
    assert base == digests(("b", 1.0))
    others = [digests(("a", 0.5)), digests(("c", 1.0)), digests(("a", 1.0), ("b", 1.0))]
    assert len({unet_digest for unet_digest, _ in (plain, base, *others)}) == 5
    assert plain[1] == base[1]  # the text encoder is as it was


def test_an_lcm_lora_brings_its_schedule(unet: Any, tiny_folder: Path, tmp_path: Path) -> None:
    state = random_lora(unet, ATTENTION, "lora_unet_")
    folder = tmp_path / "lcm-lora-sdv1-5"
    folder.mkdir()
    save_file(state, folder / "pytorch_lora_weights.safetensors")
    found = opened(tiny_folder, (folder, 1.0))
    assert found.scheduler["_class_name"] == "LCMScheduler"
    assert any("LCM-LoRA by its name" in remark for remark in found.remarks)
    save_file(state, tmp_path / "welcome.safetensors")  # no word of its own in there
    assert opened(tiny_folder, (tmp_path / "welcome.safetensors", 1.0)).scheduler["_class_name"] == "DDIMScheduler"
