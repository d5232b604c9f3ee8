"""Codes and scales: what is written is what is read, and nobody rounds twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.weights import Weights
from diffusette.quantize.codes import round_to_nearest
from diffusette.quantize.plan import Plan
from diffusette.quantize.quantized import QuantizeWeights, quantized_weights
from diffusette.quantize.scheme import parse_scheme
from diffusette.quantize.stored_weights import StoredWeights
from diffusette.stages.artifacts import ComponentSource
from diffusette.stages.errors import ModelError
from safetensors.numpy import load_file


@pytest.fixture(scope="module")
def source() -> ComponentSource:
    return open_checkpoint("demo").components["text_encoder"]


def stored(source: ComponentSource, plan: Plan, into: Path) -> StoredWeights:
    return StoredWeights(source, plan, QuantizeWeights(source, plan).run(into))


@pytest.mark.parametrize("name", ["w8c_afp", "w4g64_afp", "w4c_afp", "w6c_afp"])
def test_no_value_moves_by_more_than_half_a_step_of_its_group(name: str) -> None:
    scheme = parse_scheme(name)
    weights = np.random.default_rng(3).standard_normal((6, 64, 3, 3)).astype(np.float32)
    weights[2] *= 100
    codes = round_to_nearest(weights, scheme, "w")
    assert codes.values.shape == weights.shape
    assert codes.values.dtype == np.int8
    assert np.abs(codes.values).max() == scheme.top
    assert codes.scales.shape == (6, 9 if scheme.group else 1)
    moved = np.abs(codes.dequantised() - weights).reshape(*codes.scales.shape, -1).max(axis=2)
    assert (moved <= codes.scales * 0.5001).all()
    peaks = np.abs(weights).reshape(*codes.scales.shape, -1).max(axis=2)
    np.testing.assert_allclose(codes.scales * scheme.top, peaks, rtol=1e-6)


def test_a_channel_of_zeros_stays_zero_and_its_scale_divides_nothing_by_zero() -> None:
    weights = np.ones((2, 64), np.float32)
    weights[1] = 0
    codes = round_to_nearest(weights, parse_scheme("w8c_afp"), "w")
    assert codes.scales[1, 0] == 1
    assert not codes.dequantised()[1].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_by_name(bad: float) -> None:
    with pytest.raises(ModelError, match="unet/conv_in holds a NaN"):
        round_to_nearest(np.array([[1, bad]], np.float32), parse_scheme("w8c_afp"), "unet/conv_in")


def test_the_file_is_safetensors_that_others_read(source: ComponentSource, tmp_path: Path) -> None:
    weights = stored(source, Plan("w4g64_afp"), tmp_path)
    tensors = load_file(tmp_path / "codes.safetensors")
    coded = [name for name in weights.names() if not weights.scheme(name).is_float]
    assert set(tensors) == {name + tag for name in coded for tag in (".codes", ".scales")}
    for name in coded:
        values = tensors[name + ".codes"].astype(np.float32).reshape(*tensors[name + ".scales"].shape, -1)
        by_hand = (values * tensors[name + ".scales"][..., None]).reshape(weights.spec(name)[1])
        np.testing.assert_array_equal(weights.read(name), by_hand)
    assert "embeddings.token_embedding.weight" in coded
    assert "embeddings.position_embedding.weight" not in coded


def test_every_parameter_reads_as_its_scheme_stores_it(source: ComponentSource, tmp_path: Path) -> None:
    plan = Plan("w8c_afp", (("encoder.layers.0.mlp.fc1", "fp16"), ("encoder.layers.0.mlp.fc2.weight", "keep")))
    weights, plain = stored(source, plan, tmp_path), Weights(source)
    half = plain.read("encoder.layers.0.mlp.fc1.weight")
    np.testing.assert_array_equal(weights.read("encoder.layers.0.mlp.fc1.weight"), half.astype(np.float16))
    for name in ("encoder.layers.0.mlp.fc2.weight", "encoder.layers.0.mlp.fc1.bias"):
        np.testing.assert_array_equal(weights.read(name), plain.read(name))
        assert not weights.is_rounded(name)
    assert weights.scheme("encoder.layers.1.mlp.fc1.weight").name == "w8c_afp"
    assert weights.is_rounded("encoder.layers.1.mlp.fc1.weight")


def test_a_plan_of_floats_has_no_codes_and_one_of_integers_must_have_them(source: ComponentSource) -> None:
    def never(stage: object) -> object:
        raise AssertionError(f"{stage} was run")

    assert quantized_weights(source, Plan("fp16", (("a", "keep"),)), never) is None
    with pytest.raises(ValueError, match="text_encoder at w8c_afp needs its codes"):
        StoredWeights(source, Plan("w8c_afp"), None)


def test_equal_weights_give_equal_bytes(source: ComponentSource, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        QuantizeWeights(source, Plan("w4g64_afp")).run(tmp_path / folder)
    first, second = ((tmp_path / folder / "codes.safetensors").read_bytes() for folder in ("a", "b"))
    assert first == second


def test_the_key_holds_component_weights_and_plan(source: ComponentSource) -> None:
    stage = QuantizeWeights(source, Plan("w8c_afp"))
    others = [
        QuantizeWeights(source, Plan("w4g64_afp")),
        QuantizeWeights(replace(source, digest="other"), Plan("w8c_afp")),
        QuantizeWeights(replace(source, component="unet"), Plan("w8c_afp")),
    ]
    assert all(stage.key() != other.key() for other in others)
