"""The small files beside an ORT bundle's models, by which optimum opens it; `make interop` draws with them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.families.sd1 import SD1
from diffusette.runtimes.ort.optimum_layout import layout_files, write_layout
from diffusette.runtimes.ort.target import OrtTarget
from diffusette.stages.artifacts import AdapterSource, Checkpoint
from diffusette.stages.errors import CheckpointError

from ..workshop import SIZE

COMPONENTS: Final = tuple(SD1.components)  # of the demo


def test_optimum_finds_a_configuration_beside_every_component(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    written = write_layout(demo_checkpoint, tmp_path, (128, 64))
    assert list(written) == sorted(f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*") if f.is_file())
    assert {f"{name}/config.json" for name in COMPONENTS} < set(written)
    index = json.loads((tmp_path / "model_index.json").read_bytes())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", demo_checkpoint.scheduler["_class_name"]]
    assert json.loads((tmp_path / "unet" / "config.json").read_bytes())["sample_size"] == [16, 8]
    assert json.loads((tmp_path / "vae_decoder" / "config.json").read_bytes())["scaling_factor"] == 0.40502


def test_optimum_finds_both_text_encoders_of_sdxl(kind_folder: Callable[[str], Path]) -> None:
    files = layout_files(open_checkpoint(kind_folder("sdxl"), survey=False), (64, 64))
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert {"text_encoder_2", "tokenizer_2", "force_zeros_for_empty_prompt"} < set(index)
    assert "safety_checker" not in index
    assert json.loads(files["unet/config.json"])["sample_size"] == 8
    assert json.loads(files["text_encoder_2/config.json"])["num_hidden_layers"] == 1
    pads = [json.loads(files[f"{part}/tokenizer_config.json"])["pad_token"] for part in ("tokenizer", "tokenizer_2")]
    assert pads == ["<|endoftext|>", "!"]


def test_optimums_tokenizer_has_the_words_of_textual_inversions(demo_checkpoint: Checkpoint) -> None:
    adapter = AdapterSource("toy", "adapters/1/toy", 1.0, {}, words=("toy", "toy_1"))
    files = layout_files(dataclasses.replace(demo_checkpoint, adapters=(adapter,)))
    assert json.loads(files["tokenizer/added_tokens.json"]) == {"toy": 681, "toy_1": 682}


def test_nothing_private_and_no_version_gets_into_the_layout(demo_checkpoint: Checkpoint) -> None:
    unet = demo_checkpoint.components["unet"]
    private = dataclasses.replace(unet, config={**unet.config, "_name_or_path": "/home/someone/model"})
    checkpoint = dataclasses.replace(demo_checkpoint, components={**demo_checkpoint.components, "unet": private})
    content = b"".join(layout_files(checkpoint).values())
    assert b"someone" not in content
    assert b"_version" not in content


def test_old_tokenizer_files_are_made_of_tokenizer_json(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    old = layout_files(demo_checkpoint)
    shutil.copyfile(demo_checkpoint.tokenizer / "tokenizer.json", tmp_path / "tokenizer.json")
    new = layout_files(dataclasses.replace(demo_checkpoint, tokenizer=tmp_path))
    assert json.loads(new["tokenizer/vocab.json"]) == json.loads(old["tokenizer/vocab.json"])
    assert new["tokenizer/merges.txt"].split() == old["tokenizer/merges.txt"].split()
    assert new["tokenizer/tokenizer_config.json"] == old["tokenizer/tokenizer_config.json"]


def test_a_tokenizer_that_is_none_is_refused(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordLevel"}}')
    with pytest.raises(CheckpointError, match=r"byte-pair tokenizer\.json"):
        layout_files(dataclasses.replace(demo_checkpoint, tokenizer=tmp_path))


def test_the_target_hands_these_files_to_the_bundle(demo_checkpoint: Checkpoint) -> None:
    assert OrtTarget().assets(demo_checkpoint, SIZE) == layout_files(demo_checkpoint, SIZE)
