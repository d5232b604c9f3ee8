"""What a search refuses before it measures anything, and the recipe that it writes."""

from __future__ import annotations

import re
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusette.convert.recipe import load_recipe, parse_recipe
from diffusette.convert.search import search as search_module
from diffusette.convert.search.found_recipe import found_recipe
from diffusette.convert.search.frontier import plot_frontier
from diffusette.convert.search.goal import Found, Goal, MenuRow
from diffusette.convert.search.search import candidates, refuse_goal, search
from diffusette.quantize import tuning
from diffusette.quantize.losses import LossTable, bits_only, with_losses
from diffusette.quantize.search import frontier
from diffusette.stages.artifacts import Checkpoint
from diffusette.stages.errors import UnsupportedPrecision, UsageError
from diffusette.validate.reference import calibration

from ..quantize.test_calibrated import InProcess

SCHEMES = ("w4c_afp", "w4g64_afp", "w8c_afp")
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "text_encoder": {"embeddings.token_embedding.weight": (100, 64), "layers.0.q.weight": (64, 64)},
    "unet": {"conv_in.weight": (32, 4, 3, 3), "mid.conv.weight": (128, 128, 3, 3), "mid.conv.bias": (128,)},
}


def runtime(name: str, *precisions: str) -> Any:
    return SimpleNamespace(name=name, precisions=precisions)


@pytest.mark.parametrize(
    "goal",
    [{}, {"bits": 4.5, "budget": 9}, {"bits": 0.0}, {"budget": 0}, {"min_snr": -3.0}, {"bits": inf}, {"min_snr": nan}],
)
def test_a_goal_is_one_number_above_zero(goal: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Goal(**goal)


def test_candidates_are_what_every_target_runs_with_float_activations() -> None:
    first = runtime("a", "fp32", "fp16", "w8c_afp", "w4c_afp", "w4g64_afp", "w8c_a8")
    second = runtime("b", "fp32", "fp16", "w8c_afp", "w4c_afp")
    assert candidates((first, second)) == ("w4c_afp", "w8c_afp", "fp16")
    with pytest.raises(UnsupportedPrecision, match="'c' runs none"):
        candidates((runtime("c", "fp32", "fp16"),))


def test_a_size_that_cannot_be_had_is_refused_with_the_least_that_can() -> None:
    with pytest.raises(UsageError, match=r"--bits 2 cannot be met on ort: the least is 4\.\d\d bits a weight"):
        refuse_goal(Goal(bits=2.0), SHAPES, SCHEMES, "ort")
    with pytest.raises(UsageError, match=r"--budget 10kB cannot be met"):
        refuse_goal(Goal(budget=10_000), SHAPES, SCHEMES, "ort")
    refuse_goal(Goal(bits=4.5), SHAPES, SCHEMES, "ort")
    refuse_goal(Goal(min_snr=90.0), SHAPES, SCHEMES, "ort")  # nothing is known of losses yet


def test_a_size_beyond_the_finest_scheme_is_refused_with_the_most_there_is() -> None:
    halves = (*SCHEMES, "fp16")
    with pytest.raises(
        UsageError,
        match=r"--bits 40 exceeds the largest choice .* the most, fp16 everywhere, is 16\.\d\d bits a weight",
    ):
        refuse_goal(Goal(bits=40.0), SHAPES, halves, "ort")
    with pytest.raises(
        UsageError, match=r"--budget 1MB exceeds the largest choice .* w8c_afp everywhere, is 8\.\d\d bits"
    ):
        refuse_goal(Goal(budget=10**6), SHAPES, SCHEMES, "ort")
    refuse_goal(Goal(bits=16.0), SHAPES, halves, "ort")


def test_a_ratio_that_float32_itself_is_not_held_to_is_refused() -> None:
    refuse_goal(Goal(min_snr=100.0), SHAPES, SCHEMES, "ort")
    with pytest.raises(UsageError, match="--min-snr 101 cannot be met"):
        refuse_goal(Goal(min_snr=101.0), SHAPES, SCHEMES, "ort")


@pytest.mark.parametrize(
    ("goal", "unit"),
    [
        (Goal(bits=2.0), "bits"),
        (Goal(budget=10_000), "budget"),
        (Goal(bits=40.0), "bits"),
        (Goal(budget=10**6), "budget"),
    ],
)
def test_what_the_hint_of_a_refusal_says_can_be_had(goal: Goal, unit: str) -> None:
    with pytest.raises(UsageError) as refused:
        refuse_goal(goal, SHAPES, SCHEMES, "ort")
    (said,) = map(float, re.findall(rf"--{unit} ([\d.]+)", refused.value.hint))
    refuse_goal(Goal(bits=said) if unit == "bits" else Goal(budget=int(1e6 * said)), SHAPES, SCHEMES, "ort")


def test_a_ratio_that_no_mixture_has_is_refused_with_the_best_that_was_measured() -> None:
    bare = bits_only(SHAPES, SCHEMES)
    always = {part: {name: dict.fromkeys(SCHEMES, 1.0) for name in options} for part, options in bare.options.items()}
    table = with_losses(bare, always)
    bench: Any = SimpleNamespace(
        table=table,
        only=lambda part: LossTable({part: table.options[part]}, {part: 0}, {part: 1}),
        best=lambda part: {part: dict.fromkeys(table.options[part], "w8c_afp")},
        row=lambda *_, **__: SimpleNamespace(snr_db={"text_encoder": 60.0, "unet": 41.3}),
    )
    with pytest.raises(UsageError, match=r"--min-snr 50 cannot be met: unet has 41\.3 dB with every layer at its best"):
        search_module._until_snr(bench, 50.0)


def found() -> Found:
    table = bits_only(SHAPES, SCHEMES)
    chosen, _ = frontier(table, dict.fromkeys(SHAPES, 1.0))
    chosen["unet"]["conv_in.weight"] = "w8c_afp"
    chosen["text_encoder"]["embeddings.token_embedding.weight"] = "w4g64_afp"
    row = MenuRow(4.5, 100_000, {"text_encoder": 30.0, "unet": 40.0}, 36.5, True)
    other = MenuRow(6.0, 150_000, {"text_encoder": 35.0, "unet": 50.0}, 45.0, False)
    recipe = found_recipe(load_recipe("demo"), chosen, table, row, Goal(bits=4.5), "ort", "gptq")
    return Found(Goal(bits=4.5), "ort", recipe, (row, other), SCHEMES)


def test_the_recipe_gives_every_layer_the_scheme_that_was_chosen() -> None:
    text = found().recipe.to_toml()
    recipe = parse_recipe(text, "again.toml")
    plans = recipe.plans(SHAPES)
    assert plans["unet"].scheme("conv_in.weight", (32, 4, 3, 3)).name == "w8c_afp"
    assert plans["unet"].scheme("mid.conv.weight", (128, 128, 3, 3)).name == "w4c_afp"
    tokens = plans["text_encoder"].scheme("embeddings.token_embedding.weight", (100, 64))
    assert tokens.name == "w4g64_afp"
    assert recipe.quantize.rounding == "gptq"
    assert recipe.target.name == "ort"
    assert recipe.guidance == load_recipe("demo").guidance
    assert r"unet/conv_in" in text


def test_the_recipe_fits_a_fine_tune_but_not_another_architecture() -> None:
    from diffusette.stages.errors import RecipeError

    recipe = found().recipe
    assert recipe.plans({part: dict(shapes) for part, shapes in SHAPES.items()})
    with pytest.raises(RecipeError, match="matches nothing"):
        recipe.plans({**SHAPES, "unet": {"mid.conv.weight": (128, 128, 3, 3)}})


def test_the_plot_is_a_picture_and_the_same_each_time(tmp_path: Any) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    plot_frontier(found(), first)
    plot_frontier(found(), second)
    assert first.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert first.read_bytes() == second.read_bytes()


def test_a_large_model_is_searched_without_rounding_all_of_it(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "CHEAP_UNET", 0)
    run, said = InProcess(tmp_path), [""]
    goal = Goal(bits=6.0)
    base = parse_recipe("schema = 1\n", "mine.toml")
    answer = search(tiny_checkpoint, (64, 64), base, "ort", SCHEMES, goal, run, said.append)
    assert run.done.count("ReferenceProbes") == 2
    assert "RoundLayers" not in run.done
    assert run.done.count("EstimateErrors") == run.done.count("TryLayers") == 4
    assert run.done.count("TryMixture") == 1  # what was chosen
    (chosen,) = [row for row in answer.menu if row.chosen]
    assert chosen.measured
    assert chosen.bits <= 6
    others = [row for row in answer.menu if not row.chosen]
    assert others
    assert not any(row.measured or row.plans or row.psnr_db for row in others)
    # a sum of the losses of layers alone is near to what all of them together measure
    last = max(others, key=lambda row: row.bits)
    assert all(last.snr_db[part] > chosen.snr_db[part] - 3 for part in chosen.snr_db)
    assert answer.schemes == ()  # GPTQ rounds each layer at its own scheme only
    assert answer.recipe.quantize.rounding == "gptq"
    plot_frontier(answer, tmp_path / "plot.png")


def test_what_was_chosen_is_tuned(tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_TUNING", 12)
    monkeypatch.setattr(tuning, "STEPS", 3)
    text, goal = 'schema = 1\n[calibrate]\nprompts = ["a red circle", "two stars"]\n', Goal(bits=6.0)
    run = InProcess(tmp_path)
    base = parse_recipe(text, "mine.toml")
    answer = search(tiny_checkpoint, (64, 64), base, "ort", SCHEMES, goal, run, print)
    assert answer.recipe.quantize.rounding == "tuned"
    (chosen,) = [row for row in answer.menu if row.chosen]
    assert answer.tuned is not None
    assert (answer.tuned.bits, answer.tuned.bytes) == (chosen.bits, chosen.bytes)
    assert answer.tuned.snr_db != chosen.snr_db
    assert run.done.count("TuneScales") == 4
    assert answer.tuned.held_out_db.keys() == chosen.snr_db.keys()
    assert all(before <= after for before, after in answer.tuned.held_out_db.values())
    assert answer.to_json()["tuned"]["snr_db"].keys() == chosen.snr_db.keys()
    plot_frontier(answer, tmp_path / "plot.png")


def test_a_ratio_beyond_fp16_is_refused_before_any_layer_is_rounded(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    run = InProcess(tmp_path)
    base = parse_recipe('schema = 1\n[calibrate]\nprompts = ["a red circle"]\n', "mine.toml")
    with pytest.raises(UsageError, match=r"--min-snr 99 cannot be met: \w+ has [67]\d\.\d dB with every layer at its"):
        search(tiny_checkpoint, (64, 64), base, "ort", (*SCHEMES, "fp16"), Goal(min_snr=99.0), run, print)
    assert set(run.done) == {"ReferenceProbes", "TryMixture"}
