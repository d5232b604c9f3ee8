"""compare() and worst(): the numbers of design section 7, and what they refuse to measure."""

from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest
from diffusette.stages.errors import ModelError, ParityError
from diffusette.validate.parity import EXACT_DB, Parity, compare, finite_db, worst


def test_numbers_follow_their_formulas() -> None:
    reference = np.array([3.0, -4.0], np.float32)
    parity = compare(reference, np.array([3.0, -4.5], np.float32))
    assert parity.max_abs == 0.5
    assert parity.snr_db == pytest.approx(10 * math.log10(25 / 0.25))
    assert parity.psnr_db == pytest.approx(10 * math.log10(16 / 0.125))
    assert parity.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))


def test_pictures_take_a_peak_of_one() -> None:
    parity = compare(np.full((2, 2, 3), 0.5, np.float32), np.full((2, 2, 3), 0.4, np.float32), peak=1.0)
    assert parity.psnr_db == pytest.approx(20.0, abs=1e-5)


def test_equal_tensors_are_infinitely_close_and_json_can_say_so() -> None:
    tensor = np.arange(6, dtype=np.float32)
    parity = compare(tensor, tensor.copy())
    assert parity == Parity(0.0, math.inf, math.inf, 1.0)
    assert json.loads(json.dumps(parity.to_json(), allow_nan=False))["snr_db"] == EXACT_DB


def test_a_zero_candidate_has_no_signal_left() -> None:
    assert compare(np.ones(4, np.float32), np.zeros(4, np.float32)).snr_db == 0.0


def test_anything_where_pytorch_is_zero_is_pure_noise() -> None:
    parity = compare(np.zeros(4, np.float32), np.ones(4, np.float32))
    assert parity.snr_db == -math.inf
    assert parity.cosine == 0.0
    assert finite_db(parity.snr_db) == -EXACT_DB


def test_sums_do_not_lose_digits_in_float32() -> None:
    reference = np.full(1_000_000, 1000.0, np.float32)  # a float32 sum of squares would be off in the third digit
    candidate = reference + np.float32(0.0625)
    assert compare(reference, candidate).snr_db == pytest.approx(20 * math.log10(1000 / 0.0625), abs=1e-6)


def test_a_large_tensor_is_measured_as_a_whole_in_little_memory() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((3, 3_000_000), dtype=np.float32)
    candidate = reference.copy()
    candidate[0, 5] += 3.0
    candidate[2, -1] -= 4.0
    tracemalloc.start()
    parity = compare(reference, candidate)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert parity.max_abs == pytest.approx(4.0)
    assert parity.snr_db == pytest.approx(10 * math.log10(float(np.sum(reference.astype(np.float64) ** 2)) / 25))
    assert peak < 8 * 8 * 2**20, "a few float64 copies of a million values, whatever the tensor's size"
    candidate[2, -2] = np.nan
    with pytest.raises(ParityError, match="1 NaN and 0 infinite of 9000000 values"):
        compare(reference, candidate)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_candidate_that_is_not_finite_is_a_failure_of_parity(bad: float) -> None:
    with pytest.raises(ParityError, match=r"unet: the runtime gives .* of 2 values"):
        compare(np.ones(2), np.array([1.0, bad]), where="unet")


def test_a_reference_that_is_not_finite_is_the_models_fault() -> None:
    with pytest.raises(ModelError, match="PyTorch itself gives 1 NaN"):
        compare(np.array([1.0, np.nan]), np.ones(2))


def test_shapes_are_not_broadcast() -> None:
    with pytest.raises(ParityError, match=r"shape \(1, 3\) instead of PyTorch's \(3,\)"):
        compare(np.ones(3), np.ones((1, 3)))


def test_worst_takes_each_number_from_where_it_is_worst() -> None:
    assert worst([Parity(1.0, 90.0, 95.0, 0.9), Parity(2.0, 91.0, 94.0, 0.8)]) == Parity(2.0, 90.0, 94.0, 0.8)
    with pytest.raises(ValueError, match="nothing"):
        worst([])
