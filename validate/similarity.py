"""SSIM: how alike two pictures look in structure, after Wang et al. 2004, with the defaults of scikit-image."""

from __future__ import annotations

from typing import Final

import numpy as np

from ..runtimes.protocol import Array

_WINDOW: Final = 7  # pixels to each side of a square in which means and variances are taken
_C1, _C2 = 0.01**2, 0.03**2  # the paper's K1 and K2, for values in 0..1


def ssim(reference: Array, candidate: Array) -> float:
    """Mean over channels and over all windows that lie whole in the picture; 1 for equal ones.

    Args:
        reference, candidate: [H, W, C] floats in 0..1, of one shape, at least 7 x 7.
    """
    x, y = reference.astype(np.float64), candidate.astype(np.float64)
    mean_x, mean_y = _means(x), _means(y)
    unbiased = _WINDOW**2 / (_WINDOW**2 - 1)
    var_x = unbiased * (_means(x * x) - mean_x**2)
    var_y = unbiased * (_means(y * y) - mean_y**2)
    covariance = unbiased * (_means(x * y) - mean_x * mean_y)
    alike = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    return float((alike / ((mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2))).mean())


def _means(image: Array) -> Array:
    """Of every window: rows first, then columns."""
    for axis in (0, 1):
        image = np.lib.stride_tricks.sliding_window_view(image, _WINDOW, axis=axis).mean(-1)
    return image
