"""`convert --bits`, from the command line to a bundle that passed its gates; and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusette.pipeline.bundle import open_bundle

from .conftest import Command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--bits", 4.5, "--budget", "3MB"), "exclude each other"),
        (("--bits", 4.5, "--precision", "fp16"), "--precision fp16 is for all layers"),
        (("--budget", ""), "not a size"),
        (("--budget", "1kB"), "the least is 4."),
        (("--bits", 1), "the least is 4."),
        (("--min-snr", -1), "leaves nothing"),
    ],
)
def test_goals_that_cannot_be_are_refused_before_any_work(
    command: Command, tmp_path: Path, words: tuple[object, ...], said: str
) -> None:
    answer = command("convert", "demo", "--target", "ort", "-o", tmp_path / "out", *words)
    assert answer.code == 2
    assert said in answer.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_search_writes_a_recipe_a_plot_and_a_bundle_that_the_recipe_gives_again(
    command: Command, tiny_folder: Path, tmp_path: Path
) -> None:
    base, out, again = tmp_path / "base.toml", tmp_path / "out", tmp_path / "again"
    base.write_text('schema = 1\n[calibrate]\nprompts = ["a red circle", "two stars"]\n[schedule]\nalso = []\n')
    words = ("convert", tiny_folder, "--target", "ort", "--no-gate", "--json")
    answer = command(*words, "-r", base, "--bits", 6, "-o", out)
    assert answer.code == 0, answer.err
    menu = answer.json["search"]["menu"]
    (chosen,) = [row for row in menu if row["chosen"]]
    assert chosen["bits_per_weight"] <= 6
    bits, quality = ([row[key] for row in menu] for key in ("bits_per_weight", "image_psnr_db"))
    assert bits == sorted(bits)
    assert quality[-1] > quality[0]
    recipe = tmp_path / "out.recipe.toml"
    assert (tmp_path / "out.frontier.png").stat().st_size > 10_000
    bundle = open_bundle(out)
    assert bundle.manifest.recipe == recipe.read_text()
    assert len({scheme for part in bundle.components for scheme in bundle.manifest.components[part].schemes}) > 2
    answer = command(*words, "-r", recipe, "-o", again)
    assert answer.code == 0, answer.err
    ours, theirs = ({file.path: file.sha256 for file in each.manifest.files()} for each in (bundle, open_bundle(again)))
    weights = [name for name in ours if name.endswith((".onnx", ".onnx_data", ".ort"))]
    assert weights
    assert {name: ours[name] for name in weights} == {name: theirs[name] for name in weights}


@pytest.mark.full
def test_the_demo_at_four_and_a_half_bits_passes_its_gates(command: Command, tmp_path: Path) -> None:
    answer = command("convert", "demo", "--target", "ort", "--bits", 4.5, "-o", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    (chosen,) = [row for row in answer.json["search"]["menu"] if row["chosen"]]
    assert 4.4 < chosen["bits_per_weight"] <= 4.5
    assert chosen["image_psnr_db"] > 36  # plain 4 bits: 26 to 29
    assert open_bundle(tmp_path / "out").manifest.gate == "passed"
    checked = command("validate", tmp_path / "out", "--json")
    assert checked.code == 0, checked.err
