"""The noise that `torch.randn` draws on a CPU, without torch: a seed draws the same picture everywhere.

The generator is mt19937 (Matsumoto & Nishimura 1998) as in c10/core/CPUGeneratorImpl and ATen/core/MT19937RNGEngine.h;
the normal distribution is the one of aten/src/ATen/native/cpu/DistributionTemplates.h, `normal_fill_AVX2` and
`normal_fill`: Box-Muller in groups of 16, eight radii and eight angles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...stages.errors import UsageError

GROUP: Final = 16
SEEDS: Final = range(-(2**63), 2**64)  # what torch.Generator.manual_seed takes


class TorchNoise:
    """The stream of `torch.Generator("cpu").manual_seed(seed)`; draws follow each other as they do there.

    Values are within 1e-6 of torch's on x86 with AVX2, most of them bit for bit: torch's vectorised logarithm, sine and
    cosine are approximations, here they are correctly rounded. torch's portable path keeps the angle in double
    precision and so differs from both by up to 3e-6.
    """

    def __init__(self, seed: int) -> None:
        """Seed the stream.

        Args:
            seed: -2**63 .. 2**64 - 1; as in torch, the lowest 32 bits decide.
        Raises:
            UsageError: the seed lies outside of that.
        """
        if seed not in SEEDS:
            raise UsageError(f"seed {seed} does not fit in 64 bits", hint="use 0 to 18446744073709551615")
        self._engine = np.random.MT19937()
        # numpy seeds as torch does behind its legacy interface only, which NEP 19 has frozen
        seeded: Any = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)
        self._engine.state = seeded
        self._spare: float | None = None  # the second half of a scalar Box-Muller pair

    def normal(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """The next `torch.randn(shape, dtype=torch.float32)`."""
        size = math.prod(shape)
        if size < GROUP:
            return np.array([self._scalar() for _ in range(size)], np.float32).reshape(tuple(shape))
        uniform = self._uniform(size)
        whole = size - size % GROUP
        values = np.empty(size, np.float32)
        values[:whole] = _box_muller(uniform[:whole])
        if size % GROUP:
            values[-GROUP:] = _box_muller(self._uniform(GROUP))  # torch draws the last 16 afresh, overwriting some
        return values.reshape(tuple(shape))

    def _uniform(self, count: int) -> NDArray[np.float32]:
        """[0, 1) from the low 24 bits of each word: ATen/core/TransformationHelper.h, `uniform_real`."""
        words = self._engine.random_raw(count)
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    def _scalar(self) -> float:
        """One value in double precision: ATen/core/DistributionsHelper.h, `normal_distribution`."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        words = [int(word) for word in self._engine.random_raw(4)]
        angle, level = (((high << 32 | low) & (2**53 - 1)) * 2.0**-53 for high, low in (words[:2], words[2:]))
        radius = math.sqrt(-2.0 * math.log1p(-level))
        self._spare = radius * math.sin(2.0 * math.pi * angle)
        return radius * math.cos(2.0 * math.pi * angle)


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Uniform values, whole groups of 16, to as many normal ones: [8 radii, 8 angles] -> [8 cosines, 8 sines].

    Every step is rounded to float32 where torch rounds it; the functions themselves are evaluated in double.
    """
    radii, angles = np.moveaxis(uniform.reshape(-1, 2, GROUP // 2), 1, 0)
    logarithm = np.log((np.float32(1) - radii).astype(np.float64)).astype(np.float32)
    radius = np.sqrt(np.float32(-2) * logarithm)
    theta = (np.float32(2 * math.pi) * angles).astype(np.float64)
    pair = np.stack([np.cos(theta).astype(np.float32), np.sin(theta).astype(np.float32)], axis=1)  # [n/16, 2, 8]
    normal: NDArray[np.float32] = (radius[:, None] * pair).reshape(-1)
    return normal
