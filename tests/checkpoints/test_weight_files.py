"""Weights of one component: in shards, of a variant, or in a pickle, which is never opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.weights import Weights
from diffusette.stages.artifacts import Checkpoint
from diffusette.stages.errors import CheckpointError

from ..models import (
    UNET_WEIGHTS,
    edit_json,
    malicious_pickle,
    write_tiny_sd1,
)
from .opening import refusal_of


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_tiny_sd1(tmp_path / "sharded", max_shard_size="100KB")


def edit_shard_index(folder: Path, edit: Callable[[dict[str, str]], dict[str, str]]) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    edit_json(file, {"weight_map": edit(json.loads(file.read_text())["weight_map"])})


@pytest.mark.parametrize("shard", ["../text_encoder/model.safetensors", "/etc/hostname", "..", "a\\..\\b", ""])
def test_a_shard_outside_its_folder_is_refused(shard: str, sharded: Path) -> None:
    edit_shard_index(sharded, lambda shards: shards | {"conv_in.weight": shard})
    assert f"shard {shard!r} lies outside its folder" in refusal_of(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted((sharded / "unet").glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard}: shard is missing" in refusal_of(sharded)


def test_an_index_that_tells_another_story_than_its_shards_is_refused(sharded: Path) -> None:
    edit_shard_index(sharded, lambda shards: shards | {"conv_extra.weight": shards["conv_in.weight"]})
    assert "'conv_extra.weight' in" in refusal_of(sharded)


def test_an_index_beside_a_whole_file_is_ambiguous(sharded: Path, tiny_folder: Path) -> None:
    shutil.copyfile(tiny_folder / UNET_WEIGHTS, sharded / UNET_WEIGHTS)
    assert "holds both" in refusal_of(sharded)


def test_the_shard_index_is_one_of_the_sources(sharded: Path) -> None:
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in open_checkpoint(sharded).sources


# --- variants


def rename_weights(folder: Path, part: str, variant: str) -> None:
    (weights,) = (folder / part).glob("*.safetensors")
    weights.rename(weights.with_suffix(f".{variant}.safetensors"))


def test_a_variant_that_is_all_there_is_is_taken_with_a_word(tiny_copy: Path, tiny_checkpoint: Checkpoint) -> None:
    rename_weights(tiny_copy, "unet", "non_ema")
    rename_weights(tiny_copy, "vae", "mine")
    found = open_checkpoint(tiny_copy)
    assert found.digest == tiny_checkpoint.digest
    assert any("unet" in said and "'non_ema'" in said and "not averaged" in said for said in found.remarks)
    assert any("vae" in said and "'mine'" in said for said in found.remarks)
    assert "unet/diffusion_pytorch_model.non_ema.safetensors" in found.sources


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_usual_variants_need_no_word(variant: str, tiny_copy: Path) -> None:
    for part in ("unet", "vae", "text_encoder"):
        rename_weights(tiny_copy, part, variant)
    assert open_checkpoint(tiny_copy, survey=False).remarks == ()


def test_an_unusual_variant_never_wins_over_others(tiny_copy: Path) -> None:
    weights = tiny_copy / UNET_WEIGHTS
    shutil.copyfile(weights, weights.with_suffix(".non_ema.safetensors"))
    assert "unet/diffusion_pytorch_model.safetensors" in open_checkpoint(tiny_copy, survey=False).sources
    weights.rename(weights.with_suffix(".ema.safetensors"))
    assert "the variants ema, non_ema and none without a variant" in refusal_of(tiny_copy)


@pytest.mark.parametrize("name", ["safetensors.index.fp16.json", "safetensors.fp16.index.json"])
def test_shards_of_a_variant_have_two_names_for_their_index(name: str, tmp_path: Path) -> None:
    folder = write_tiny_sd1(tmp_path / "sharded", variant="fp16", max_shard_size="100KB")
    (index,) = (folder / "unet").glob("*index*.json")
    index.rename(index.with_name(f"diffusion_pytorch_model.{name}"))
    found = open_checkpoint(folder, survey=False)
    assert f"unet/diffusion_pytorch_model.{name}" in found.sources
    assert len(found.components["unet"].files) > 1


# --- pickles


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "diffusion_pytorch_model.fp16.bin"]
)
def test_pickled_weights_are_refused_and_run_nothing(name: str, tiny_copy: Path, tmp_path: Path) -> None:
    (tiny_copy / UNET_WEIGHTS).unlink()
    malicious_pickle(tiny_copy / "unet" / name, tmp_path / "ran")
    assert f"{name}: weights in a Python pickle" in refusal_of(tiny_copy)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_renamed_to_safetensors_inside_a_folder_runs_nothing(tiny_copy: Path, tmp_path: Path) -> None:
    malicious_pickle(tiny_copy / "renamed.pt", tmp_path / "ran")
    (tiny_copy / "renamed.pt").replace(tiny_copy / UNET_WEIGHTS)
    assert "a pickle in a zip archive, as torch.save writes it, not safetensors" in refusal_of(tiny_copy)
    assert not (tmp_path / "ran").exists()


def test_the_bomb_of_these_tests_does_go_off_when_it_is_unpickled(tmp_path: Path) -> None:
    import pickle

    malicious_pickle(tmp_path / "model.ckpt", tmp_path / "ran")
    pickle.loads((tmp_path / "model.ckpt").read_bytes())  # noqa: S301
    assert (tmp_path / "ran").exists()


def test_the_hint_for_a_pickle_makes_a_copy_that_opens(tiny_copy: Path, tiny_checkpoint: Checkpoint) -> None:
    import shlex
    import subprocess
    import sys

    import torch
    from safetensors.torch import load_file

    pickled = tiny_copy / "unet/diffusion_pytorch_model.bin"
    torch.save(load_file(tiny_copy / UNET_WEIGHTS), pickled)
    (tiny_copy / UNET_WEIGHTS).unlink()
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(tiny_copy)
    python, *arguments = shlex.split(refusal.value.hint.partition("first: ")[2])
    assert (python, arguments[-2:]) == ("python", ["OLD", "NEW.safetensors"])
    subprocess.run(
        [sys.executable, *arguments[:-2], str(pickled), str(tiny_copy / UNET_WEIGHTS)], check=True, timeout=120
    )
    copied = Weights(open_checkpoint(tiny_copy).components["unet"])
    genuine = Weights(tiny_checkpoint.components["unet"])
    for name in genuine.names():
        np.testing.assert_array_equal(copied.read(name), genuine.read(name))
