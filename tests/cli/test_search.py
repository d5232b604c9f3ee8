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
def test_a_search_ends_in_a_bundle_a_recipe_and_a_plot(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = command("convert", "demo", "--target", "ort", "--bits", 4.5, "-o", out, "--json")
    assert answer.code == 0, answer.err
    menu = answer.json["search"]["menu"]
    (chosen,) = [row for row in menu if row["chosen"]]
    assert 4.4 < chosen["bits_per_weight"] <= 4.5
    assert chosen["image_psnr_db"] > 36  # plain 4 bits: 26 to 29
    assert [row["bits_per_weight"] for row in menu] == sorted(row["bits_per_weight"] for row in menu)
    bundle = open_bundle(out)
    assert bundle.manifest.gate == "passed"
    assert (tmp_path / "out.frontier.png").stat().st_size > 10_000
    recipe = tmp_path / "out.recipe.toml"
    assert bundle.manifest.recipe == recipe.read_text()
    again = command("convert", "demo", "-r", recipe, "-o", tmp_path / "again", "--json")
    assert again.code == 0, again.err
    assert again.json["bundles"][0]["target"] == "ort"
    plans = [{part: b.plan(part) for part in b.components} for b in (bundle, open_bundle(tmp_path / "again"))]
    assert plans[0] == plans[1]
    checked = command("validate", out, "--json")
    assert checked.code == 0, checked.err
