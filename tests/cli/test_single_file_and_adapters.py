"""A single file with two adapters, by the command line alone, on every target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from diffusette.checkpoints.checkpoint import DEMO_FOLDER
from safetensors.torch import save_file

from ..adapters import ATTENTION, adapt, random_lora, save_peft
from ..ldm import ldm_tensors, original_pipeline, write_ldm
from .conftest import Command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.safetensors` in the original layout, `style.safetensors` of kohya, `turned/` of PEFT (OFT)."""
    folder = tmp_path_factory.mktemp("made")
    pipeline = original_pipeline("sd1")
    write_ldm(folder / "model.safetensors", ldm_tensors(pipeline))
    save_file(random_lora(pipeline.unet, ATTENTION, "lora_unet_"), folder / "style.safetensors")
    save_peft(adapt(pipeline.unet, "oft"), "oft", folder / "turned")
    return folder


@pytest.mark.slow
def test_a_single_file_with_lora_and_oft_converts_and_validates_on_every_target(
    made: Path, tmp_path: Path, command: Command, cache: Path
) -> None:
    given = ["--tokenizer", str(DEMO_FOLDER / "tokenizer"), "--size", "64x64", "--json"]
    given += ["--adapter", f"{made / 'style.safetensors'}:0.6", "--adapter", str(made / "turned")]
    answer = command("convert", made / "model.safetensors", "-o", tmp_path / "out", *given)
    assert answer.code == 0, answer.err
    said = answer.json
    assert {bundle["target"] for bundle in said["bundles"]} == {"ort", "ncnn", "mnn"}
    assert all(bundle["gate"] == "passed" for bundle in said["bundles"])
    moved = said["adapters_moved"]["unet"]
    assert len(moved) >= 6
    assert all(share > 0.01 for share in moved.values())
    manifest = json.loads((tmp_path / "out/ort/manifest.json").read_text())
    assert [(a["file"], a["scale"]) for a in manifest["provenance"]["adapters"]] == [
        ("style.safetensors", 0.6),
        ("turned/adapter_model.safetensors", 1.0),
    ]
    assert str(made) not in json.dumps(manifest)
    # without --reference: the merged reference is rebuilt from what was given here
    answer = command("validate", tmp_path / "out/ort", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["ok"]
    # a machine that does not know where it was converted
    (cache / "sources" / f"{manifest['provenance']['checkpoint']}.json").unlink()
    elsewhere = ["validate", tmp_path / "out/ort", "--reference", made / "model.safetensors", *given[:2]]
    answer = command(*elsewhere)
    assert answer.code == 4
    assert "--adapter style.safetensors:0.6 --adapter turned/adapter_model.safetensors:1" in " ".join(
        answer.err.split()
    )
    answer = command(*elsewhere, *given[5:], "--json")
    assert answer.code == 0, answer.err
    assert answer.json["ok"]
    answer = command("profile", *elsewhere[1:], *given[5:], "--vs", "torch", "--runs", 1, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["components"]["unet"]["torch"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_single_files_of_sd2_and_sdxl_convert_pass_their_gates_and_draw(
    kind: str, tmp_path: Path, command: Command
) -> None:
    said = {"modelspec.prediction_type": "v"} if kind == "sd2" else {}
    file = write_ldm(tmp_path / "model.safetensors", ldm_tensors(original_pipeline(kind)), metadata=said)
    shutil.copytree(DEMO_FOLDER / "tokenizer", tmp_path / "tokenizer")
    if kind == "sdxl":
        shutil.copytree(DEMO_FOLDER / "tokenizer", tmp_path / "tokenizer_2")
    answer = command("convert", file, "-o", tmp_path / "out", "--target", "ort", "--size", "64x64", "--json")
    assert answer.code == 0, answer.err
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["family"], manifest["gate"]) == (kind, "passed")
    assert manifest["schedule"]["prediction_type"] == ("v_prediction" if kind == "sd2" else "epsilon")
    answer = command("generate", tmp_path / "out", "a red star", "-o", tmp_path / "star.png", "--json")
    assert answer.code == 0, answer.err
    assert (tmp_path / "star.png").stat().st_size > 1000
