"""SSIM without scikit-image is scikit-image's."""

from __future__ import annotations

import numpy as np
import pytest
from diffusette.validate.similarity import ssim
from skimage.metrics import structural_similarity


@pytest.mark.parametrize("shape", [(7, 7, 3), (64, 48, 3), (33, 20, 1)])
@pytest.mark.parametrize("noise", [0.0, 1e-4, 0.05, 1.0])
def test_it_is_that_of_scikit_image(shape: tuple[int, ...], noise: float) -> None:
    chance = np.random.default_rng(0)
    smooth = np.linspace(0, 1, int(np.prod(shape))).reshape(shape).astype(np.float32)
    other = np.clip(smooth + noise * chance.standard_normal(shape), 0, 1).astype(np.float32)
    theirs = structural_similarity(smooth.astype(np.float64), other.astype(np.float64), channel_axis=2, data_range=1.0)
    assert ssim(smooth, other) == pytest.approx(theirs, abs=1e-9)


def test_flat_pictures_are_alike() -> None:
    flat = np.full((16, 16, 3), 0.5, np.float32)
    assert ssim(flat, flat) == 1.0
