"""TorchNoise draws what torch.randn draws on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from diffusette.runtimes.txt2img.noise import TorchNoise
from diffusette.stages.errors import UsageError

# Largest difference seen on AVX2 and AVX-512 machines is 4.8e-7, one unit in the last place of values above 4. torch's
# portable path, taken elsewhere, rounds the angle differently.
TOLERANCE = 1e-6 if torch.backends.cpu.get_cpu_capability() != "DEFAULT" else 3e-6


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1, 2**32 + 5, 2**63 + 11, 2**64 - 1, -1, -(2**63)])
def test_draws_follow_each_other_as_in_torch(seed: int) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = TorchNoise(seed)
    # whole groups of 16, remainders, and fewer than 16, whose pairs are cached from one draw to the next
    for shape in [(1, 4, 8, 8), (3,), (17,), (16,), (1,), (100,), (1, 4, 64, 64), (5,), (5,), (1, 4, 7, 9), (33,)]:
        expected = torch.randn(shape, generator=generator).numpy()
        drawn = noise.normal(shape)
        assert (drawn.dtype, drawn.shape) == (np.float32, shape)
        assert np.abs(drawn - expected).max() <= TOLERANCE


def test_it_is_what_the_pipeline_starts_from() -> None:
    expected = randn_tensor((1, 4, 64, 64), generator=torch.Generator("cpu").manual_seed(7), dtype=torch.float32)
    drawn = TorchNoise(7).normal((1, 4, 64, 64))
    assert np.abs(drawn - expected.numpy()).max() <= TOLERANCE
    assert (drawn == expected.numpy()).mean() > 0.5


def test_seeds_differ_and_repeat() -> None:
    first = TorchNoise(1).normal((32,))
    assert np.array_equal(first, TorchNoise(1).normal((32,)))
    assert not np.array_equal(first, TorchNoise(2).normal((32,)))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_that_torch_refuses_is_refused(seed: int) -> None:
    with pytest.raises(UsageError, match="64 bits"):
        TorchNoise(seed)
