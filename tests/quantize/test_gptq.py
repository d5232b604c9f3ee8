"""Rounding by output error: less of it than rounding to the nearest has, and never more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusette.quantize.codes import round_to_nearest
from diffusette.quantize.gptq import round_by_output
from diffusette.quantize.moments import blocks_of, bytes_of, chunks_of, output_error, rows_of
from diffusette.quantize.scheme import parse_scheme
from diffusette.stages.errors import ModelError
from torch import nn

SCHEMES = tuple(parse_scheme(name) for name in ("w4c_afp", "w4g16_afp", "w8c_afp"))


def correlated(rows: int, width: int) -> torch.Tensor:
    """Inputs whose coordinates go together, as activations do."""
    chance = torch.Generator().manual_seed(0)
    few = torch.randn(rows, width // 4, generator=chance)
    return few @ torch.randn(width // 4, width, generator=chance) + 0.1 * torch.randn(rows, width, generator=chance)


def moments_of(x: torch.Tensor) -> list[torch.Tensor]:
    return [x[:, a:b].T @ x[:, a:b] / len(x) for a, b in blocks_of(x.shape[1])]


def test_halves_the_output_error_of_plain_rounding_on_correlated_inputs() -> None:
    weight = np.random.default_rng(1).standard_normal((24, 64), np.float32)
    x = correlated(512, 64)
    for name, rounded in round_by_output(weight, moments_of(x), SCHEMES, "w").items():
        plain = round_to_nearest(weight, parse_scheme(name), "w")
        found = ((torch.from_numpy(rounded.codes.dequantised() - weight) @ x.T) ** 2).mean().item()
        before = ((torch.from_numpy(plain.dequantised() - weight) @ x.T) ** 2).mean().item()
        assert found < before / 2, name
        assert rounded.errors.mean() == pytest.approx(found, rel=1e-3)


def test_no_output_channel_gets_worse_and_codes_stay_in_range() -> None:
    weight = np.random.default_rng(2).standard_normal((16, 4, 3, 3), np.float32)
    moments = [torch.eye(36)]  # uncorrelated inputs: nothing to gain but by the scales
    for name, rounded in round_by_output(weight, moments, SCHEMES, "w").items():
        scheme = parse_scheme(name)
        plain = torch.from_numpy(round_to_nearest(weight, scheme, "w").dequantised() - weight).reshape(16, -1)
        assert (torch.from_numpy(rounded.errors) <= output_error(plain, moments) + 1e-12).all()
        assert rounded.codes.values.shape == weight.shape
        assert np.abs(rounded.codes.values.astype(int)).max() <= scheme.top
        assert rounded.codes.scales.shape == (16, scheme.groups(weight.shape))


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight = np.random.default_rng(3).standard_normal((4, 32), np.float32)
    x = correlated(64, 32)
    x[:, ::2] = 0
    for moments in (moments_of(x), [torch.zeros(32, 32)]):
        for rounded in round_by_output(weight, moments, SCHEMES, "w").values():
            assert np.isfinite(rounded.codes.scales).all()


def test_refuses_a_weight_that_is_not_finite_by_name() -> None:
    weight = np.full((2, 8), np.nan, np.float32)
    with pytest.raises(ModelError, match="unet/conv_in"):
        round_by_output(weight, [torch.eye(8)], SCHEMES[:1], "unet/conv_in.weight")


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 0, 1), (1, 2, 2)])
def test_a_convolution_is_its_weight_rows_times_its_patches(stride: int, padding: int, dilation: int) -> None:
    layer = nn.Conv2d(3, 5, 3, stride=stride, padding=padding, dilation=dilation, bias=False)
    x = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layer(x).flatten(2).transpose(1, 2).reshape(-1, 5)
        assert torch.allclose(rows_of(layer, x) @ layer.weight.flatten(1).T, expected, atol=1e-5)


def test_chunks_stay_within_their_memory_and_keep_every_layer_once() -> None:
    shapes = {"a": (8, 100), "b": (8, 10, 3, 3), "c": (8, 9000)}
    assert blocks_of(9000) == ((0, 4500), (4500, 9000))
    chunks = chunks_of(shapes, limit=4 * (100**2 + 90**2))
    assert chunks == (("a", "b"), ("c",))
    assert sum(bytes_of(shapes[path]) for path in chunks[0]) <= 4 * (100**2 + 90**2)


def test_a_layer_cut_into_pieces_of_work_is_rounded_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusette.quantize import gptq

    weight = np.random.default_rng(4).standard_normal((24, 64), np.float32)
    moments = moments_of(correlated(256, 64))
    whole = round_by_output(weight, moments, SCHEMES, "w")
    monkeypatch.setattr(gptq, "_WORK", 64 * 24 * 5)  # five output channels at a time
    for name, pieces in round_by_output(weight, moments, SCHEMES, "w").items():
        assert (pieces.codes.values == whole[name].codes.values).mean() > 0.999  # sums of another order, at ties
        assert np.allclose(pieces.errors, whole[name].errors, rtol=1e-3)
