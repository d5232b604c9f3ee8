"""A low-rank branch takes what costs the codes most, is stored in float16, and counts as bits."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.weights import Weights
from diffusette.convert.recipe import parse_recipe
from diffusette.quantize.codes import round_to_nearest
from diffusette.quantize.gptq import round_by_output
from diffusette.quantize.low_rank import split
from diffusette.quantize.moments import output_error
from diffusette.quantize.plan import Plan
from diffusette.quantize.quantized import QuantizeWeights
from diffusette.quantize.scheme import parse_scheme
from diffusette.quantize.stored_weights import StoredWeights
from diffusette.runtimes.checks import refuse_schemes
from diffusette.runtimes.ort.target import OrtTarget
from diffusette.runtimes.registry import get_target
from diffusette.stages.errors import ModelError, RecipeError, UnsupportedPrecision, UsageError
from safetensors.numpy import load_file

PARAMETERS: Final[dict[str, dict[str, tuple[int, ...]]]] = {
    "unet": {"conv_in.weight": (32, 4, 3, 3), "conv_out.weight": (4, 32, 3, 3), "conv_in.bias": (32,)},
    "text_encoder": {"embeddings.token_embedding.weight": (1000, 64)},
}


def with_outliers(rows: int, columns: int, count: int = 3) -> np.ndarray:
    """Normal weights, a few columns of which are thirty times larger."""
    weight = np.random.default_rng(5).standard_normal((rows, columns)).astype(np.float32)
    weight[:, :: columns // count] *= 30
    return weight


@pytest.mark.parametrize("shape", [(40, 72), (24, 8, 3, 3), (300, 700), (700, 300)])
def test_branch_and_rest_are_the_weight_and_the_branch_is_the_best_of_its_rank(shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    branch, rest = split(weight, 4, "w")
    assert branch.up.dtype == branch.down.dtype == np.float16
    assert branch.up.shape == (shape[0], 4)
    assert branch.down.shape == (4, weight.size // shape[0])
    np.testing.assert_allclose(rest + branch.product().reshape(shape), weight, atol=1e-5)
    values = np.linalg.svd(weight.reshape(shape[0], -1), compute_uv=False)
    assert np.linalg.norm(rest) == pytest.approx(np.linalg.norm(values[4:]), rel=1e-3)  # Eckart-Young


def test_outliers_go_into_the_branch_and_the_codes_lose_less() -> None:
    weight = with_outliers(64, 128)
    plain, branched = (round_to_nearest(weight, parse_scheme(name), "w") for name in ("w4c_afp", "w4cr4_afp"))
    errors = [np.linalg.norm(codes.dequantised() - weight) for codes in (plain, branched)]
    assert errors[1] < errors[0] / 5


def test_the_branch_follows_the_inputs_where_they_are_known() -> None:
    weight = np.random.default_rng(2).standard_normal((48, 64)).astype(np.float32)
    sizes = torch.ones(64)
    sizes[:8] = 100.0  # a few inputs are ten times larger
    moments = [torch.diag(sizes)]
    blind, seeing = split(weight, 4, "w")[1], split(weight, 4, "w", moments)[1]
    blind_error, seeing_error = (float(output_error(torch.from_numpy(rest), moments).sum()) for rest in (blind, seeing))
    assert seeing_error < 0.8 * blind_error


def test_gptq_rounds_what_the_branch_leaves_and_tells_the_error_of_both() -> None:
    weight, moments = with_outliers(32, 64), [torch.eye(64)]
    schemes = tuple(parse_scheme(name) for name in ("w4cr4_afp", "w4c_afp", "w4g32r4_afp", "w4cr8_afp"))
    found = round_by_output(weight, moments, schemes, "w")
    assert list(found) == [scheme.name for scheme in schemes]
    for name, rounded in found.items():
        assert (rounded.codes.branch is not None) == bool(parse_scheme(name).rank)
        miss = torch.from_numpy(rounded.codes.dequantised() - weight)
        np.testing.assert_allclose(rounded.errors, output_error(miss, moments), rtol=1e-3)
    assert found["w4cr4_afp"].errors.sum() < found["w4c_afp"].errors.sum() / 5
    assert found["w4cr8_afp"].errors.sum() < found["w4cr4_afp"].errors.sum()


def test_the_branch_beside_gptq_is_the_best_for_what_its_codes_leave() -> None:
    """Weights without outliers: a branch of the weight takes little, one of the error more than its share."""
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(512, 12, generator=chance) @ torch.randn(12, 48, generator=chance)
    x += 0.3 * torch.randn(512, 48, generator=chance)
    weight, moments = np.random.default_rng(7).standard_normal((40, 48)).astype(np.float32), [x.T @ x / len(x)]
    plain, branched = parse_scheme("w4c_afp"), parse_scheme("w4cr6_afp")
    without = round_by_output(weight, moments, (plain,), "w")["w4c_afp"].errors.sum()
    first = round_by_output(split(weight, 6, "w")[1], moments, (plain,), "w")["w4c_afp"].errors.sum()
    found = round_by_output(weight, moments, (branched,), "w")["w4cr6_afp"].errors.sum()
    assert found < min(0.9 * first, 0.75 * without)


def test_equal_weights_give_equal_factors_and_zeros_stay_zeros() -> None:
    weight = np.random.default_rng(3).standard_normal((300, 400)).astype(np.float32)
    one, two = (split(weight, 4, "w")[0] for _ in range(2))
    assert np.array_equal(one.up, two.up)
    assert np.array_equal(one.down, two.down)
    branch, rest = split(np.zeros((8, 16), np.float32), 2, "w")
    assert not branch.product().any()
    assert not rest.any()


@pytest.mark.parametrize(("bad", "said"), [(np.nan, "holds a NaN"), (1e12, "beyond float16")])
def test_what_no_branch_can_hold_is_refused_by_name(bad: float, said: str) -> None:
    weight = np.zeros((8, 16), np.float32)
    weight[0, 0] = bad
    with pytest.raises(ModelError, match=f"unet/conv_in {said}|unet/conv_in holds .*{said}"):
        split(weight, 1, "unet/conv_in")


def test_stored_weights_are_codes_and_branch_and_the_bits_count_both(tmp_path: Path) -> None:
    source, plan = open_checkpoint("demo").components["text_encoder"], Plan("w4g64r8_afp")
    stored = StoredWeights(source, plan, QuantizeWeights(source, plan).run(tmp_path))
    tensors = load_file(tmp_path / "codes.safetensors")
    name = "encoder.layers.0.mlp.fc1.weight"
    codes = tensors[name + ".codes"].astype(np.float32).reshape(*tensors[name + ".scales"].shape, -1)
    values = (codes * tensors[name + ".scales"][..., None]).reshape(stored.spec(name)[1])
    values += tensors[name + ".low_rank.up"].astype(np.float32) @ tensors[name + ".low_rank.down"].astype(np.float32)
    np.testing.assert_allclose(stored.read(name), values, atol=1e-6)
    bits = 8 * sum(tensor.nbytes for tensor in tensors.values())
    halved = 4 * sum(tensors[name].size for name in tensors if name.endswith(".codes"))  # a byte each in this file
    floats = sum(32 * Weights(source).read(name).size for name in stored.names() if stored.scheme(name).is_float)
    assert plan.bits(stored.shapes()) == bits - halved + floats
    assert stored.scheme("embeddings.token_embedding.weight").name == "w4g64_afp"


def test_layers_too_small_for_a_branch_go_without_and_vectors_stay_float() -> None:
    plan = Plan("w4g64r8_afp")
    assert plan.scheme("a.weight", (64, 128)).name == "w4g64r8_afp"
    assert plan.scheme("a.weight", (8, 128)).name == "w4g64_afp"
    assert plan.scheme("a.weight", (64, 8)).name == "w8c_afp"  # as without a branch: rows too short for groups
    assert plan.scheme("a.bias", (64,)).name == "fp32"
    assert parse_scheme("w4g64r8_afp").bits((64, 128)) == parse_scheme("w4g64_afp").bits((64, 128)) + 16 * 8 * 192


def test_the_rank_is_part_of_the_key() -> None:
    assert Plan("w4cr8_afp").key() != Plan("w4cr4_afp").key() != Plan("w4c_afp").key()


# --- refusals


@pytest.mark.parametrize(
    "name", ["w4cr0_afp", "w4cr-1_afp", "w4cr_afp", "w4r8c_afp", "w4cr08_afp", "w4cr1.5_afp", "fp16r8"]
)
def test_a_rank_that_is_none_is_no_scheme(name: str) -> None:
    with pytest.raises(UsageError, match="is not a scheme") as caught:
        parse_scheme(name)
    assert "w4g64r16_afp" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "precision = 'w4cr32_afp'",
            r"my.toml \[quantize\]: 'w4cr32_afp': .* rank 32; .*conv_in.weight, is 32 x 36",
        ),
        (
            "[[quantize.rules]]\nmatch = 'unet/conv_out'\nscheme = 'w4cr4_afp'",
            "rank 4; .*unet/conv_out.weight, is 4 x 288",
        ),
        ("[[quantize.rules]]\nmatch = 'text_encoder/.*'\nscheme = 'w4cr4_afp'", "token_embedding.weight, is 1000 x 64"),
    ],
)
def test_a_branch_that_no_layer_can_have_is_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(f"schema = 1\n[quantize]\n{text}\n", "my.toml").plans(PARAMETERS)


def test_a_rule_gives_a_branch_to_what_it_matches() -> None:
    rule = "[[quantize.rules]]\nmatch = 'unet/conv_in'\nscheme = 'w4cr8_afp'\n"
    text = f"schema = 1\n[quantize]\nprecision = 'w4c_afp'\n{rule}"
    plan = parse_recipe(text, "my.toml").plans(PARAMETERS)["unet"]
    assert {name: plan.scheme(name, shape).rank for name, shape in PARAMETERS["unet"].items()} == {
        "conv_in.weight": 8,
        "conv_out.weight": 0,
        "conv_in.bias": 0,
    }


class Without(OrtTarget):
    low_rank = False


def test_targets_refuse_what_they_do_not_run() -> None:
    with pytest.raises(UnsupportedPrecision, match="'w8cr8_a8': a low-rank branch goes with float activations"):
        refuse_schemes(get_target("ort"), "unet", Plan("w8cr8_a8"))
    with pytest.raises(UnsupportedPrecision, match="'w3cr8_afp'"):
        refuse_schemes(get_target("ort"), "unet", Plan("w3cr8_afp"))
    with pytest.raises(
        UnsupportedPrecision, match="a low-rank branch, as in 'w4cr8_afp', is not built for target 'ort'"
    ):
        refuse_schemes(Without(), "unet", Plan("w4cr8_afp"))
