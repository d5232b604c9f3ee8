"""What is proposed can be done: the recipe reads it, the target takes it, and the module gets more bits."""

from __future__ import annotations

import pytest
from diffusette.convert.recipe import parse_recipe
from diffusette.quantize.plan import Plan
from diffusette.runtimes.checks import refuse_schemes
from diffusette.runtimes.registry import TARGETS, get_target
from diffusette.validate.layers.advice import rule_for

PART = "unet"
SHAPES = {
    "conv_in.weight": (64, 4, 3, 3),
    "conv_in.bias": (64,),
    "narrow.weight": (4, 4, 1, 1),  # too short a row for groups
    "blocks.0.norm.weight": (64,),
    "blocks.0.attn.to_q.weight": (64, 64),
    "blocks.0.attn.to_out.0.weight": (64, 64),
    "blocks.0.attn.to_out.0.bias": (64,),
    "embeddings.token_embedding.weight": (128, 64),
    "embeddings.position_embedding.weight": (77, 64),
}
WITHOUT = ("blocks.0.norm", "blocks.0.act", "blocks.0", "blocks.0.attn", "")
CASES = [
    (target, Plan(scheme, exceptions))
    for target in TARGETS
    for scheme in get_target(target).precisions
    for exceptions in ((), (("blocks.0.attn.to_q.weight", "fp16"), ("conv_in.weight", "fp32")))
]


def accepted(target: str, plan: Plan) -> bool:
    """Whether a target takes a plan, so that a bundle of it may exist."""
    from diffusette.stages.errors import UnsupportedPrecision

    try:
        refuse_schemes(get_target(target), PART, plan)
    except UnsupportedPrecision:
        return False
    return True


@pytest.mark.parametrize(
    ("target", "plan"), [pytest.param(t, p, id=f"{t}-{p.label}") for t, p in CASES if accepted(t, p)]
)
def test_a_rule_that_is_proposed_is_read_and_taken_and_gives_more_bits(target: str, plan: Plan) -> None:
    for module in {name.rpartition(".")[0] for name in SHAPES} - set(WITHOUT):
        own = [name for name in SHAPES if name.startswith(f"{module}.") and len(SHAPES[name]) > 1]
        rule = rule_for(get_target(target), PART, module, plan, SHAPES)
        stored = {plan.scheme(name, SHAPES[name]).name for name in own}
        if rule is None:
            assert stored == {"fp32"}, f"{module} has no more bits to get"
            continue
        exceptions = "".join(
            f"[[quantize.rules]]\nmatch = '{PART}/{name}'\nscheme = \"{scheme}\"\n" for name, scheme in plan.exceptions
        )
        text = f'schema = 1\n[quantize]\nprecision = "{plan.default}"\n{exceptions}{rule.toml}\n'
        changed = parse_recipe(text, "a recipe").plans({PART: SHAPES})[PART]
        refuse_schemes(get_target(target), PART, changed)
        for name in own:
            before, after = (each.scheme(name, SHAPES[name]).bits(SHAPES[name]) for each in (plan, changed))
            assert after > before or stored != {plan.scheme(name, SHAPES[name]).name}


@pytest.mark.parametrize("module", WITHOUT)
def test_nothing_is_proposed_about_a_module_without_weights_to_round(module: str) -> None:
    for target, plan in CASES:
        assert rule_for(get_target(target), PART, module, plan, SHAPES) is None


def test_a_target_with_one_float_is_told_of_the_whole_component() -> None:
    rules = {
        target: rule_for(get_target(target), PART, "blocks.0.attn.to_q", Plan("fp16"), SHAPES) for target in TARGETS
    }
    assert {target: rule.match if rule else None for target, rule in rules.items()} == {
        "ort": r"unet/blocks\.0\.attn\.to_q",
        "ncnn": r"unet/blocks\.0\.attn\.to_q",
        "mnn": "unet/.*",
    }
