"""Storing weights in fewer bits by rounding alone."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..stages.errors import ModelError

FLOAT16_MAX: Final = 65504.0  # IEEE 754 binary16


def to_float16(array: NDArray[Any], name: str) -> NDArray[np.float16]:
    """Round `array` to the nearest float16 (ties to even).

    Raises:
        ModelError: a value is beyond ±65504 and would become infinite; `name` says whose.
    """
    peak = float(np.abs(array).max(initial=0.0))
    if not peak <= FLOAT16_MAX:
        raise ModelError(
            f"{name} holds {peak:.4g}, beyond float16's largest value {FLOAT16_MAX:.0f}",
            hint='keep this component in float32: a recipe rule with scheme = "fp32"',
        )
    return array.astype(np.float16)
