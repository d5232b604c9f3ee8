from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusette.export import checkpoint as checkpoint_module
from diffusette.export.checkpoint import DEMO_FOLDER, open_checkpoint
from diffusette.export.weights import Weights
from diffusette.pipeline.artifacts import Checkpoint
from diffusette.pipeline.errors import CheckpointError

from ..models import (
    TEXT_WEIGHTS,
    UNET_WEIGHTS,
    VAE_WEIGHTS,
    edit_json,
    lone_safetensors,
    malicious_pickle,
    poison,
    truncate,
    write_tiny_sd1,
)


@pytest.fixture
def no_weights_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any read of tensor data fail the test."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(checkpoint_module, "survey_file", fail)
    monkeypatch.setattr(np, "fromfile", fail)


# --- what opening gives


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
    monkeypatch.setattr("diffusette.export.survey._one_pass", lambda *_: pytest.fail("weights were read again"))
    assert open_checkpoint(tiny_folder, memo=tmp_path / "memo") == tiny_checkpoint


# --- damage, each told by name, place and remedy


def refusal_of(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(path)
    assert refusal.value.hint
    assert refusal.value.exit_code == 4
    return refusal.value.what


def test_nothing_there(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal_of(tmp_path / "nothing")
    assert "no such file or folder" in refusal_of("some-owner/some-model")


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, tiny_folder: Path) -> None:
    assert "not a checkpoint: no model_index.json" in refusal_of(tmp_path)
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(tiny_folder.parent)
    assert refusal.value.hint == f"did you mean {tiny_folder}?"
    snapshot = shutil.copytree(tiny_folder, tmp_path / "models--owner--name/snapshots/abc")
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(tmp_path / "models--owner--name")
    assert refusal.value.hint == f"did you mean {snapshot}?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "a JSON list where an object belongs"),
        ("{}", "_class_name: Field required"),
        ('{"_class_name": "StableDiffusionPipeline", "../up": ["a", "B"]}', "'../up' is no name of a component"),
    ],
)
def test_a_broken_index(content: str, message: str, tiny_copy: Path) -> None:
    (tiny_copy / "model_index.json").write_text(content)
    what = refusal_of(tiny_copy)
    assert message in what
    assert "model_index.json" in what


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae", "scheduler", "tokenizer"])
def test_a_component_whose_folder_is_gone_is_named(part: str, tiny_copy: Path) -> None:
    shutil.rmtree(tiny_copy / part)
    assert f"component '{part}' is missing" in refusal_of(tiny_copy)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_component_left_out_of_the_index_is_named(part: str, tiny_copy: Path) -> None:
    edit_json(tiny_copy / "model_index.json", {part: [None, None]})
    assert f"component '{part}' is missing" in refusal_of(tiny_copy)


@pytest.mark.parametrize("file", [UNET_WEIGHTS, VAE_WEIGHTS, TEXT_WEIGHTS])
def test_truncated_weights(file: str, tiny_copy: Path, no_weights_read: None) -> None:
    size = (tiny_copy / file).stat().st_size
    truncate(tiny_copy / file, 100)
    what = refusal_of(tiny_copy)
    assert f"weights end at byte {size - 100}, header promises {size}" in what
    assert file in what


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value: float, tiny_copy: Path) -> None:
    poison(tiny_copy / UNET_WEIGHTS, "conv_in.weight", 5, value)
    what = refusal_of(tiny_copy)
    assert "'conv_in.weight' holds 1 NaN or infinite values, the first at 5" in what
    assert UNET_WEIGHTS in what


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("unet/config.json", "block_out_channels", None),
        ("unet/config.json", "block_out_channels", 320),
        ("vae/config.json", "latent_channels", "4"),
        ("text_encoder/config.json", "vocab_size", None),
    ],
)
def test_a_config_without_a_key_that_is_needed(file: str, key: str, value: object, tiny_copy: Path) -> None:
    edit_json(tiny_copy / file, {key: value})
    what = refusal_of(tiny_copy)
    assert f"{key!r} is {value!r}" in what
    assert file in what
    edit_json(tiny_copy / file, {}, (key,))
    assert f"{key!r} is missing" in refusal_of(tiny_copy)


def test_a_config_with_a_number_that_json_does_not_have(tiny_copy: Path) -> None:
    edit_json(tiny_copy / "vae/config.json", {"scaling_factor": float("nan")})
    assert "NaN is no JSON number" in refusal_of(tiny_copy)


def test_a_scheduler_that_diffusers_saved_with_minus_infinity_opens_as_one_without(tiny_copy: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    edit_json(tiny_copy / "model_index.json", {"scheduler": ["diffusers", "DPMSolverMultistepScheduler"]})
    file = tiny_copy / "scheduler/scheduler_config.json"
    DPMSolverMultistepScheduler().save_pretrained(file.parent)
    assert '"lambda_min_clipped": -Infinity' in file.read_text()
    found = open_checkpoint(tiny_copy)
    assert "lambda_min_clipped" not in found.scheduler
    edit_json(file, {}, ("lambda_min_clipped",))
    assert open_checkpoint(tiny_copy).digest == found.digest
    edit_json(file, {"lambda_min_clipped": -5.1})
    assert open_checkpoint(tiny_copy).scheduler["lambda_min_clipped"] == -5.1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta_end", float("nan")),
        ("beta_end", float("-inf")),
        ("lambda_min_clipped", float("inf")),
        ("trained_betas", [0.1, float("inf")]),
    ],
)
def test_any_other_number_of_a_scheduler_that_is_not_finite_is_named(key: str, value: object, tiny_copy: Path) -> None:
    edit_json(tiny_copy / "scheduler/scheduler_config.json", {key: value})
    assert f"scheduler_config.json: {key!r} is {value!r}, a finite number is needed" in refusal_of(tiny_copy)


def test_a_path_that_no_file_system_takes(tmp_path: Path) -> None:
    assert "cannot be opened: File name too long" in refusal_of(tmp_path / ("x" * 300))


def test_a_component_of_another_class(tiny_copy: Path) -> None:
    edit_json(tiny_copy / "model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]})
    assert "vae is a AutoencoderTiny, not a AutoencoderKL" in refusal_of(tiny_copy)


def test_weights_that_are_absent_or_a_dead_link(tiny_copy: Path) -> None:
    (tiny_copy / UNET_WEIGHTS).unlink()
    assert "no weights (*.safetensors)" in refusal_of(tiny_copy)
    (tiny_copy / UNET_WEIGHTS).symlink_to(tiny_copy / "gone")
    assert "link to a file that is gone" in refusal_of(tiny_copy)


def test_adapter_weights_in_the_place_of_a_component(tiny_copy: Path) -> None:
    lone_safetensors(tiny_copy / UNET_WEIGHTS, ("down_blocks.0.attentions.0.to_k.lora_A.weight",))
    assert "a LoRA or LyCORIS adapter" in refusal_of(tiny_copy)


# --- shards


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


# --- pickles: never opened


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "diffusion_pytorch_model.fp16.bin"]
)
def test_pickled_weights_are_refused_and_run_nothing(name: str, tiny_copy: Path, tmp_path: Path) -> None:
    (tiny_copy / UNET_WEIGHTS).unlink()
    malicious_pickle(tiny_copy / "unet" / name, tmp_path / "ran")
    assert f"{name}: weights in a Python pickle" in refusal_of(tiny_copy)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.safetensors"])
def test_a_pickle_given_as_the_checkpoint_is_refused_and_runs_nothing(name: str, tmp_path: Path) -> None:
    malicious_pickle(tmp_path / name, tmp_path / "ran")
    assert "pickle" in refusal_of(tmp_path / name)
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


# --- lone files


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


def test_a_folder_of_one_model_is_called_what_it_is(tiny_folder: Path) -> None:
    assert "a UNet alone (class UNet2DConditionModel)" in refusal_of(tiny_folder / "unet")
    assert "a VAE alone" in refusal_of(tiny_folder / "vae")
    assert "a text encoder alone" in refusal_of(tiny_folder / "text_encoder")


def test_unknown_tensors_are_shown(tmp_path: Path) -> None:
    assert "2 tensors of no model known here (one, two" in refusal_of(
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
