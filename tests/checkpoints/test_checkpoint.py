from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from diffusette.checkpoints.checkpoint import DEMO_FOLDER, open_checkpoint
from diffusette.stages.artifacts import Checkpoint

from ..models import (
    TEXT_WEIGHTS,
    edit_json,
    poison,
)


def test_the_word_demo_opens_the_embedded_checkpoint(demo_checkpoint: Checkpoint) -> None:
    assert (demo_checkpoint.name, demo_checkpoint.root, demo_checkpoint.family) == ("demo", DEMO_FOLDER, "sd1")
    assert set(demo_checkpoint.components) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert {name: source.parameters for name, source in demo_checkpoint.components.items()} == {
        "text_encoder": 692_096,
        "unet": 3_372_484,
        "vae_decoder": 434_855,
        "vae_encoder": 265_808,
    }
    assert {source.dtype for source in demo_checkpoint.components.values()} == {"float32"}
    assert demo_checkpoint.vae_scale == 8
    assert demo_checkpoint.scheduler["_class_name"] == "DDIMScheduler"
    assert demo_checkpoint.components["vae_decoder"].config["scaling_factor"] == 0.40502


def test_sources_hash_every_file_that_decides_the_result(tiny_checkpoint: Checkpoint) -> None:
    root = tiny_checkpoint.root
    files = {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}
    assert set(tiny_checkpoint.sources) == files
    for name, digest in tiny_checkpoint.sources.items():
        assert digest == hashlib.sha256((root / name).read_bytes()).hexdigest()


def test_the_same_content_elsewhere_is_the_same_source(tiny_copy: Path, tiny_checkpoint: Checkpoint) -> None:
    versions = {"_diffusers_version": "0.1", "_name_or_path": "/home/somebody"}
    edit_json(tiny_copy / "unet/config.json", versions)
    edit_json(
        tiny_copy / "text_encoder/config.json", {"transformers_version": "4.0", "torch_dtype": "float16"}, ("dtype",)
    )
    found = open_checkpoint(tiny_copy)
    assert found.digest == tiny_checkpoint.digest
    assert found.components["unet"].digest == tiny_checkpoint.components["unet"].digest
    assert found.components["text_encoder"].digest == tiny_checkpoint.components["text_encoder"].digest


def test_a_digest_follows_config_and_weights_of_its_own_component(tiny_copy: Path, tiny_checkpoint: Checkpoint) -> None:
    edit_json(tiny_copy / "vae/config.json", {"scaling_factor": 0.5})
    poison(tiny_copy / TEXT_WEIGHTS, "final_layer_norm.bias", 0, 0.25)
    found = open_checkpoint(tiny_copy)
    before = tiny_checkpoint.components
    changed = [name for name, source in found.components.items() if source.digest != before[name].digest]
    assert changed == ["text_encoder", "vae_decoder", "vae_encoder"]
    assert found.digest != tiny_checkpoint.digest


@pytest.mark.parametrize(
    ("file", "change"),
    [("scheduler/scheduler_config.json", {"beta_end": 0.02}), ("tokenizer/tokenizer.json", {"a": 1})],
)
def test_scheduler_and_tokenizer_decide_the_digest_too(
    file: str, change: dict[str, float], tiny_copy: Path, tiny_checkpoint: Checkpoint
) -> None:
    edit_json(tiny_copy / file, change)
    assert open_checkpoint(tiny_copy).digest != tiny_checkpoint.digest


def test_added_tokens_are_a_source_and_decide_the_digest(tiny_copy: Path, tiny_checkpoint: Checkpoint) -> None:
    added = tiny_copy / "tokenizer/added_tokens.json"
    added.write_text('{"<cat>": 681}')
    found = open_checkpoint(tiny_copy)
    assert found.sources["tokenizer/added_tokens.json"] == hashlib.sha256(added.read_bytes()).hexdigest()
    added.write_text('{"<dog>": 681}')
    assert len({tiny_checkpoint.digest, found.digest, open_checkpoint(tiny_copy).digest}) == 3


def test_both_halves_of_the_vae_share_files_but_not_digests(tiny_checkpoint: Checkpoint) -> None:
    decoder, encoder = (tiny_checkpoint.components[name] for name in ("vae_decoder", "vae_encoder"))
    assert decoder.files == encoder.files
    assert decoder.digest != encoder.digest


def test_a_link_tree_as_hub_caches_make_it_opens_as_the_files_themselves(
    tmp_path: Path, tiny_folder: Path, tiny_checkpoint: Checkpoint
) -> None:
    snapshot = tmp_path / "snapshots/abc"
    for file in tiny_folder.rglob("*"):
        if file.is_file():
            blob = tmp_path / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, blob)
            link = snapshot / file.relative_to(tiny_folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    assert open_checkpoint(snapshot).sources == tiny_checkpoint.sources


def test_configs_of_the_first_releases_are_completed(tiny_copy: Path) -> None:
    edit_json(tiny_copy / "vae/config.json", {}, ("scaling_factor", "shift_factor", "use_quant_conv"))
    edit_json(tiny_copy / "unet/config.json", {"from_the_future": 1}, ("time_cond_proj_dim", "attention_type"))
    components = open_checkpoint(tiny_copy).components
    assert components["vae_decoder"].config["scaling_factor"] == 0.18215
    assert components["unet"].config["from_the_future"] == 1


def test_without_a_survey_only_headers_are_read_and_digests_are_empty(
    tiny_folder: Path, tiny_checkpoint: Checkpoint, no_weights_read: None
) -> None:
    found = open_checkpoint(tiny_folder, survey=False)
    assert found.digest == ""
    assert {source.digest for source in found.components.values()} == {""}
    assert found.sources == dict.fromkeys(tiny_checkpoint.sources, "")
    assert found.components["unet"].parameters == tiny_checkpoint.components["unet"].parameters


def test_the_memo_spares_the_second_pass(
    tiny_folder: Path, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_checkpoint(tiny_folder, memo=tmp_path / "memo")
    monkeypatch.setattr("diffusette.checkpoints.survey._one_pass", lambda *_: pytest.fail("weights were read again"))
    assert open_checkpoint(tiny_folder, memo=tmp_path / "memo") == tiny_checkpoint
