"""What users get wrong ends with a message and the right exit code, and costs them nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from diffusette.stages.errors import ModelError
from safetensors.numpy import load_file, save_file

from ..models import UNET_WEIGHTS
from .conftest import Command


def lose_a_component(folder: Path) -> None:
    (folder / UNET_WEIGHTS).unlink()


def truncate(folder: Path) -> None:
    file = folder / UNET_WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])


def put_nan(folder: Path) -> None:
    tensors = load_file(folder / UNET_WEIGHTS)
    tensors["conv_in.weight"][0, 0, 0, 0] = np.nan
    save_file(tensors, folder / UNET_WEIGHTS)


def rename_pickle(folder: Path) -> None:
    (folder / UNET_WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def other_family(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusion3Pipeline"
    index["transformer"] = ["diffusers", "SD3Transformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_a_component, "unet"),
        (truncate, "diffusion_pytorch_model.safetensors"),
        (put_nan, "conv_in.weight"),
        (rename_pickle, "safetensors"),
        (other_family, "Stable Diffusion 3"),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_any_work(
    command: Command, tiny_copy: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(tiny_copy)
    answer = command("convert", tiny_copy, "-o", tmp_path / "out", "--target", "ort")
    assert answer.code == 4, answer.err
    assert words.lower() in answer.err.lower()
    assert "Traceback" not in answer.err
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_is_said_so(command: Command, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "absent"):
        answer = command("convert", path, "-o", tmp_path / "out")
        assert answer.code == 4, answer.err
        assert str(path) in answer.err


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--target", "tflite"], 2, "one of: ort, ncnn, mnn"),
        (["--precision", "w3c_afp"], 4, "it runs: fp32, fp16"),
        (["--precision", "auto", "--no-gate"], 2, "needs the gates"),
        (["--record-memory", "--no-gate"], 2, "--record-memory needs the gates"),
        (["--precision", "fp61"], 2, "fp16"),
        (["--size", "512"], 2, "HEIGHTxWIDTH"),
        (["--size", "500x512"], 2, "multiples of 8"),
        (["--size", "64x64", "--size", "96"], 2, "is not HEIGHTxWIDTH"),
        (["--size", "64x64", "--size", "96x100"], 2, "--size 96x100: both sides must be positive multiples of 8"),
        (["--size", "64x64", "--size", "0x64"], 2, "--size 0x64: both sides"),
        (["-r", "sd1-fp61"], 2, "did you mean"),
        (["--prezision", "fp16"], 2, "--precision"),
    ],
)
def test_a_wrong_option_never_becomes_a_default(
    command: Command, tmp_path: Path, words: list[str], code: int, told: str
) -> None:
    answer = command("convert", "demo", "-o", tmp_path / "out", *words)
    assert answer.code == code, answer.err
    assert told in answer.err
    assert not (tmp_path / "out").exists()


def test_json_errors_are_one_document(command: Command, tmp_path: Path) -> None:
    answer = command("convert", tmp_path / "absent", "-o", tmp_path / "out", "--json")
    assert answer.json["ok"] is False
    assert answer.json["error"]["exit_code"] == answer.code == 4


def test_a_folder_of_the_users_is_never_written_over(command: Command, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for extra in ((), ("--overwrite",)):
        answer = command("convert", "demo", "-o", tmp_path, "--target", "ort", *extra)
        assert answer.code == 2, answer.err
        assert "not a bundle" in answer.err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_bundle_is_kept_unless_overwrite_is_asked_for(
    command: Command, converted: Path, tmp_path: Path
) -> None:
    place = tmp_path / "bundle"
    assert command("convert", "demo", "-o", place, "--target", "mnn").code == 0
    before = (place / "manifest.json").read_bytes()
    refused = command("convert", "demo", "-o", place, "--target", "ncnn")
    assert refused.code == 2
    assert "--overwrite" in refused.err
    assert (place / "manifest.json").read_bytes() == before
    assert command("convert", "demo", "-o", place, "--target", "ncnn", "--overwrite").code == 0
    assert json.loads((place / "manifest.json").read_text())["target"]["name"] == "ncnn"


def test_an_unwritable_output_is_told_before_any_work(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = command("convert", "demo", "-o", tmp_path / "file" / "out", "--target", "ort")
    assert answer.code == 2, answer.err
    assert "file" in answer.err


def test_too_little_memory_is_refused_with_both_figures(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusette.convert.forecast.memory_available_mib", lambda: 100.0)
    answer = command("convert", "demo", "-o", tmp_path / "out", "--target", "ort")
    assert answer.code == 4
    assert "100 MiB are available" in answer.err
    assert "--ignore-forecast" in answer.err


def test_a_long_prompt_warns_what_was_cut_and_an_empty_one_draws(
    command: Command, converted: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "a.png"
    long = command("generate", converted / "ort", "a red circle " * 40, "-o", picture, "--steps", 10)
    assert long.code == 0, long.err
    assert "truncated because CLIP can only handle sequences up to 77 tokens" in long.err
    empty = command("generate", converted / "ort", "", "-o", picture, "--steps", 10)
    assert (empty.code, empty.err.count("warning")) == (0, 0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "7"], "has 10, 20"),
        (["--scheduler", "dimm"], "schedulers: "),
        (["-o", "picture.jpg"], ".png"),
        (["--control-scale", "0.5"], "without a control picture"),
        (["--control-scale", "0"], "there is no ControlNet in this bundle"),
    ],
)
def test_generate_refuses_what_it_cannot_do(command: Command, converted: Path, words: list[str], told: str) -> None:
    answer = command("generate", converted / "ort", "a star", *words)
    assert answer.code == 2, answer.err
    assert told in answer.err


def test_validate_asks_for_the_checkpoint_when_nobody_knows_it(
    command: Command, converted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path
) -> None:
    monkeypatch.setenv("DIFFUSETTE_CACHE", str(tmp_path / "empty"))
    answer = command("validate", converted / "ort")
    assert answer.code == 4
    assert "--reference" in answer.err
    wrong = command("validate", converted / "ort", "--reference", tiny_folder)
    assert wrong.code == 4
    assert "is not the checkpoint" in wrong.err


def test_a_folder_of_several_bundles_is_told_as_such(command: Command, converted: Path) -> None:
    answer = command("verify", converted)
    assert answer.code == 6
    assert "give one of mnn, ncnn, ort" in answer.err


def test_no_arguments_show_help_and_a_typo_names_the_command(command: Command) -> None:
    assert "convert" in command("--help").out
    assert "Did you mean 'convert'?" in command("convrt").err
    assert command("--version").out.startswith("diffusette ")


@pytest.mark.parametrize(
    "words", [("convrt",), ("verify",), ("profile", "x", "--threads", "many")], ids=lambda words: words[0]
)
def test_a_usage_error_with_json_is_one_document_too(command: Command, words: tuple[str, ...]) -> None:
    answer = command(*words, "--json")
    assert answer.json["ok"] is False
    assert answer.json["error"]["exit_code"] == answer.code == 2
    assert answer.json["error"]["what"] in answer.err


def test_a_bug_with_json_is_one_document_too(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[str]:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("diffusette.convert.recipe.shipped_recipes", broken)
    answer = command("recipe", "list", "--json")
    assert answer.json["error"]["kind"] == "ZeroDivisionError"
    assert answer.json["error"]["exit_code"] == answer.code == 70
    assert "Traceback" in answer.err


FAILED_GATE = """
from types import SimpleNamespace
from diffusette import cli
from diffusette.bundle import bundle
from diffusette.validate import check
report = SimpleNamespace(ok=False, to_json=lambda: {"ok": False, "long": "x" * 100_000})
bundle.open_bundle = lambda path: SimpleNamespace(manifest=SimpleNamespace(name="demo"))
check.check_bundle = lambda *args, **kwargs: (report, [])
cli.main()
"""


@pytest.mark.parametrize("buffering", ["", "1"])
@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["-m", "diffusette", "recipe", "list", "--json"], 0),
        (["-m", "diffusette", "targets"], 0),
        (["-m", "diffusette", "--help"], 0),
        (["-m", "diffusette", "verify", "absent", "--json"], 6),
        (["-c", FAILED_GATE, "validate", "bundle", "--json"], 5),
    ],
    ids=["json", "table", "help", "error", "failed gate"],
)
def test_a_reader_who_goes_away_changes_no_exit_code(argv: list[str], code: int, buffering: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONUNBUFFERED": buffering}
    ended = subprocess.run(
        [sys.executable, *argv], stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, check=False
    )
    os.close(writing)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "ignored" not in ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("buffering", ["", "1"])
def test_a_full_stdout_is_told_in_a_line(buffering: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": buffering}
    argv = [sys.executable, "-m", "diffusette", "recipe", "list", "--json"]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert ended.returncode == 4
    assert "standard output cannot be written: No space left on device" in ended.stderr
    assert len(ended.stderr.splitlines()) == 2  # and its hint


def test_demo_replaces_nobody_elses_bundle(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(place: Path) -> object:
        return SimpleNamespace(manifest=SimpleNamespace(name=name))

    def start(*args: object, **options: object) -> None:
        raise ModelError("it started")

    monkeypatch.setattr("diffusette.bundle.bundle.open_bundle", opened)
    monkeypatch.setattr("diffusette.convert.convert.convert", start)
    (tmp_path / "ncnn").mkdir()
    (tmp_path / "ncnn" / "manifest.json").write_text("{}")
    name = "my-model"
    refused = command("demo", "-o", tmp_path)
    assert refused.code == 2
    assert f"{tmp_path / 'ncnn'} holds a bundle of 'my-model'" in refused.err
    name = "demo"
    assert "it started" in command("demo", "-o", tmp_path).err
