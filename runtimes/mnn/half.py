"""float16 as MNN's converter makes it of a constant."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def cut_to_half(values: NDArray[Any]) -> NDArray[np.float16]:
    """`values` cut towards zero, and to the largest numbers of float16: half_float's default rounding."""
    limit = np.finfo(np.float16).max
    clipped = np.clip(values.astype(np.float32), -limit, limit)
    nearest = clipped.astype(np.float16)
    beyond = np.abs(nearest.astype(np.float32)) > np.abs(clipped)
    return np.where(beyond, np.nextafter(nearest, np.float16(0)), nearest)
