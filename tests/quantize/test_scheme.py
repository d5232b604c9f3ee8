"""Scheme names, and storing weights as float16."""

from __future__ import annotations

import numpy as np
import pytest
from diffusette.quantize.cast import to_float16
from diffusette.quantize.scheme import Scheme, parse_scheme
from diffusette.stages.errors import ModelError, UsageError


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("fp16", Scheme("fp16", 16, None, 32)),
        ("w8c_afp", Scheme("w8c_afp", 8, None, 32)),
        ("w4g64_afp", Scheme("w4g64_afp", 4, 64, 32)),
        ("w8c_a8", Scheme("w8c_a8", 8, None, 8)),
        ("w4g64r16_afp", Scheme("w4g64r16_afp", 4, 64, 32, 16)),
        ("w4cr8_afp", Scheme("w4cr8_afp", 4, None, 32, 8)),
        ("keep", Scheme("fp32", 32, None, 32)),
    ],
)
def test_a_name_says_all(name: str, scheme: Scheme) -> None:
    assert parse_scheme(name) == scheme


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("fp32", 32.0),
        ("fp16", 16.0),
        ("w8c_afp", 8 + 32 / 1152),
        ("w4g64_afp", 4.5),
        ("w6c_afp", 6 + 32 / 1152),
        ("w4g32_afp", 5.0),
    ],
)
def test_bits_count_every_scale(name: str, bits: float) -> None:
    shape = (10, 128, 3, 3)
    assert parse_scheme(name).bits(shape) / 11520 == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("name", ["", "int8", "w8_afp", "w9c_afp", "w4g_afp", "w4g0_afp", "fp61", "w8c_afp "])
def test_other_words_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is not a scheme"):
        parse_scheme(name)


def test_rounding_goes_to_the_nearest_half_and_ties_to_even() -> None:
    step = 2.0**-10  # of float16 between 1 and 2
    values = np.array([1 + 0.49 * step, 1 + 0.5 * step, 1 + 1.5 * step, -65504], np.float32)
    assert to_float16(values, "x").tolist() == [1, 1, 1 + 2 * step, -65504]


@pytest.mark.parametrize("value", [65520.0, -1e9, np.inf, np.nan])
def test_what_float16_cannot_hold_is_refused_by_name(value: float) -> None:
    with pytest.raises(ModelError, match="unet/conv_in"):
        to_float16(np.array([0, value], np.float32), "unet/conv_in")
