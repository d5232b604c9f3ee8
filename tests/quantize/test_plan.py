"""A plan says for every parameter how it is stored, and what that takes."""

from __future__ import annotations

import pytest
from diffusette.quantize.plan import Plan, plan_of, shares

SHAPES = {
    "conv_in.weight": (32, 4, 3, 3),
    "conv_in.bias": (32,),
    "mid.proj.weight": (64, 128),
    "mid.norm.weight": (64,),
    "embeddings.token_embedding.weight": (100, 64),
    "embeddings.position_embedding.weight": (77, 64),
}


def stored(plan: Plan) -> dict[str, str]:
    return {name: plan.scheme(name, shape).name for name, shape in SHAPES.items()}


def test_fp16_rounds_all_but_vectors() -> None:
    assert stored(Plan("fp16")) == {name: "fp16" if len(shape) > 1 else "fp32" for name, shape in SHAPES.items()}


def test_integers_are_for_what_is_multiplied_and_for_token_embeddings() -> None:
    assert stored(Plan("w8c_afp")) == {
        "conv_in.weight": "w8c_afp",
        "conv_in.bias": "fp32",
        "mid.proj.weight": "w8c_afp",
        "mid.norm.weight": "fp32",
        "embeddings.token_embedding.weight": "w8c_afp",
        "embeddings.position_embedding.weight": "fp32",
    }


@pytest.mark.parametrize(
    ("shape", "scheme"),
    [
        ((8, 4, 1, 1), "w8c_afp"),  # rows of 4
        ((8, 3, 3, 3), "w8c_afp"),  # 27
        ((8, 62), "w4g64_afp"),  # one group of 62
        ((8, 122), "w4g64_afp"),  # two of 61
        ((8, 127), "w8c_afp"),  # a prime
        ((8, 48, 3, 3), "w4g64_afp"),  # 432 = 8 x 54
    ],
)
def test_rows_without_a_divisor_near_the_group_take_eight_bits(shape: tuple[int, ...], scheme: str) -> None:
    assert Plan("w4g64_afp").scheme("x.weight", shape).name == scheme
    assert Plan("w4g64_a8").scheme("x.weight", shape).name == scheme.replace("afp", "a8")


def test_an_exception_names_a_parameter_or_its_module_and_the_parameter_wins() -> None:
    plan = Plan("w4g64_afp", (("mid.proj", "keep"), ("conv_in", "fp16"), ("conv_in.weight", "w8c_afp")))
    assert plan.scheme("mid.proj.weight", (64, 128)).name == "fp32"
    assert plan.scheme("conv_in.weight", (32, 4, 3, 3)).name == "w8c_afp"
    assert plan.label == "w4g64_afp+fp16+keep+w8c_afp"
    assert [scheme.name for scheme in plan.schemes] == ["w4g64_afp", "fp16", "fp32", "w8c_afp"]


def test_bits_are_counted_to_the_last_scale_and_bias() -> None:
    plan = Plan("w4g64_afp", (("mid.proj", "w8c_afp"),))
    by_hand = (
        (32 * 36 * 4 + 32 * 32)  # conv_in: rows of 36 are one group
        + 32 * 32  # its bias
        + (64 * 128 * 8 + 64 * 32)
        + 64 * 32  # the norm
        + (100 * 64 * 4 + 100 * 32)
        + 77 * 64 * 32
    )
    assert plan.bits(SHAPES) == by_hand
    numbers = 32 * 36 + 32 + 64 * 128 + 64 + 6400 + 4928
    assert plan.bits_per_weight(SHAPES) == by_hand / numbers
    found = shares(plan, SHAPES)
    assert set(found) == {"w4g64_afp", "w8c_afp", "fp32"}
    assert sum(share for share, _ in found.values()) == pytest.approx(1)
    assert sum(share * bits for share, bits in found.values()) == pytest.approx(by_hand / numbers)
    assert found["w8c_afp"] == (64 * 128 / numbers, 8.25)


def test_most_numbers_are_the_default() -> None:
    schemes = {name: "w8c_afp" for name, shape in SHAPES.items() if len(shape) > 1}
    assert plan_of(schemes, SHAPES) == Plan("w8c_afp")
    mixed = plan_of(schemes | {"conv_in.weight": "fp16"}, SHAPES)
    assert mixed == Plan("w8c_afp", (("conv_in.weight", "fp16"),))


def test_the_key_does_not_depend_on_the_order_of_exceptions() -> None:
    pairs = (("a", "fp16"), ("b", "keep"))
    assert Plan("fp32", pairs).key() == Plan("fp32", pairs[::-1]).key()
    assert Plan("fp32", pairs).key() != Plan("fp32").key()
