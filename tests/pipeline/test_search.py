"""What a search refuses before it measures anything, and the recipe that it writes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from diffusette.pipeline.errors import UnsupportedPrecision, UsageError
from diffusette.pipeline.found_recipe import found_recipe
from diffusette.pipeline.frontier import plot_frontier
from diffusette.pipeline.goal import Found, Goal, MenuRow
from diffusette.pipeline.recipe import load_recipe, parse_recipe
from diffusette.pipeline.search import candidates, refuse_goal
from diffusette.quantize.losses import bits_only
from diffusette.quantize.search import frontier

SCHEMES = ("w4c_afp", "w4g64_afp", "w8c_afp")
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "text_encoder": {"embeddings.token_embedding.weight": (100, 64), "layers.0.q.weight": (64, 64)},
    "unet": {"conv_in.weight": (32, 4, 3, 3), "mid.conv.weight": (128, 128, 3, 3), "mid.conv.bias": (128,)},
}


def runtime(name: str, *precisions: str) -> Any:
    return SimpleNamespace(name=name, precisions=precisions)


@pytest.mark.parametrize("goal", [{}, {"bits": 4.5, "budget": 100}, {"bits": 0.0}, {"budget": 0}, {"min_snr": -3.0}])
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
    with pytest.raises(UsageError, match=r"--budget 0.01MB cannot be met"):
        refuse_goal(Goal(budget=10_000), SHAPES, SCHEMES, "ort")
    refuse_goal(Goal(bits=4.5), SHAPES, SCHEMES, "ort")
    refuse_goal(Goal(min_snr=90.0), SHAPES, SCHEMES, "ort")  # nothing is known of losses yet


def found() -> Found:
    table = bits_only(SHAPES, SCHEMES)
    chosen, _ = frontier(table, dict.fromkeys(SHAPES, 1.0))
    chosen["unet"]["conv_in.weight"] = "w8c_afp"
    chosen["text_encoder"]["embeddings.token_embedding.weight"] = "w4g64_afp"
    row = MenuRow(4.5, 100_000, {"text_encoder": 30.0, "unet": 40.0}, 36.5, True)
    other = MenuRow(6.0, 150_000, {"text_encoder": 35.0, "unet": 50.0}, 45.0, False)
    recipe = found_recipe(load_recipe("demo"), chosen, table, row, Goal(bits=4.5), "ort")
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
    from diffusette.pipeline.errors import RecipeError

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
