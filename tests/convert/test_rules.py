"""Which parameters a recipe's rules take, and which rules are refused because they take none."""

from __future__ import annotations

import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.convert.recipe import parameters_of
from diffusette.quantize.plan import Plan
from diffusette.stages.artifacts import ROLES
from diffusette.stages.errors import RecipeError

from .test_recipe import PARAMETERS, recipe


@pytest.mark.parametrize(
    ("match", "fp32"),
    [
        ("unet/.*", {"unet"}),
        (".*", set(ROLES)),
        ("vae_.*", {"vae_decoder", "vae_encoder"}),
        ("(unet|vae_decoder)/.*", {"unet", "vae_decoder"}),
    ],
)
def test_a_rule_that_takes_a_component_as_a_whole_gives_it_one_scheme(match: str, fp32: set[str]) -> None:
    plans = recipe(f"[[quantize.rules]]\nmatch = '{match}'\nscheme = 'fp32'").plans(PARAMETERS)
    assert all(not plan.exceptions for plan in plans.values())
    assert {name for name, plan in plans.items() if plan.default == "fp32"} == fp32


@pytest.mark.parametrize(
    "match", ["unet/conv_in", r"unet/conv_in\.weight", "unet/conv_.*", ".*/conv_in", "unet/conv_in.*"]
)
def test_a_rule_takes_modules_and_parameters_by_their_whole_name(match: str) -> None:
    rule = recipe(f"[[quantize.rules]]\nmatch = '{match}'\nscheme = 'keep'")
    assert rule.plans(PARAMETERS)["unet"] == Plan("fp16", (("conv_in.weight", "keep"),))


@pytest.mark.parametrize(
    ("match", "what", "hint"),
    [
        (
            "unett/.*",
            "my.toml [[quantize.rules]] 1: 'unett/.*' matches nothing",
            "components here: text_encoder, text_encoder_2, unet",
        ),
        ("unet/conv", "'unet/conv' matches nothing", "did you mean 'unet/conv_in'?"),
        ("conv_in", "'conv_in' matches nothing", "COMPONENT/MODULE"),
        ("unet/norm", "matches only biases and norms, such as unet/norm.weight", "stay float32"),
    ],
)
def test_a_rule_without_effect_is_an_error(match: str, what: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(f"[[quantize.rules]]\nmatch = '{match}'\nscheme = 'fp32'").plans(PARAMETERS)
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_the_last_rule_that_matches_wins() -> None:
    rules = "".join(
        f"[[quantize.rules]]\nmatch = '{match}'\nscheme = '{scheme}'\n"
        for match, scheme in [(".*", "fp32"), ("unet/.*", "w8c_afp"), ("unet/conv_in", "fp16"), ("vae_.*", "fp16")]
    )
    found = recipe(rules).plans(PARAMETERS)
    assert found["text_encoder"] == Plan("fp32")
    assert found["unet"] == Plan("w8c_afp", (("conv_in.weight", "fp16"),))
    assert found["vae_decoder"] == found["vae_encoder"] == Plan("fp16")


def test_rules_are_held_against_the_parameters_of_a_real_checkpoint() -> None:
    parameters = parameters_of(open_checkpoint("demo", survey=False))
    assert set(parameters) == set(ROLES) - {"controlnet", "text_encoder_2"}
    assert parameters["unet"]["conv_in.weight"] == (48, 4, 3, 3)
    plans = recipe("[[quantize.rules]]\nmatch = 'unet/.*attn2.*'\nscheme = 'w8c_afp'").plans(parameters)
    assert plans["unet"].label == "fp16+w8c_afp"
    assert all("attn2" in name for name, _ in plans["unet"].exceptions)
