"""A tensor in brief, as goldens.json holds it, and how another tensor is held against it."""

from __future__ import annotations

import math
from typing import Annotated, Final, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ...runtimes.protocol import Array
from ...stages.errors import BundleError
from ...stages.strict import Strict

MOST_VALUES: Final = 256
"""Of a tensor: a port that errs, errs everywhere; 256 values are 3 kB as text."""


class Sample(Strict):
    """A tensor in brief: every `stride`-th value of its C-order, at most 256, and what sums over all of it give."""

    shape: tuple[int, ...]
    stride: Annotated[int, Field(ge=1)]
    values: tuple[float, ...]
    mean: float
    std: float

    @classmethod
    def of(cls, tensor: Array, most: int = MOST_VALUES, thinned: int = 1) -> Self:
        """At most `most` values, of which every `thinned`-th stays."""
        flat = np.asarray(tensor, np.float64).ravel()
        stride = max(1, -(-flat.size // most)) * thinned
        if tensor.shape[-1:] == (3,) and stride % 3 == 0:  # of a picture's colours only the first would be seen
            stride += 1
        values = tuple(float(str(np.float32(value))) for value in flat[::stride])  # the shortest that is this float32
        return cls(
            shape=tuple(tensor.shape), stride=stride, values=values, mean=float(flat.mean()), std=float(flat.std())
        )

    @property
    def is_whole(self) -> bool:
        """Whether there are as many values as shape and stride say."""
        return len(self.values) == -(-math.prod(self.shape) // self.stride)

    def scattered(self) -> NDArray[np.float32]:
        """A tensor with the sampled values in their places, and zeros elsewhere.

        What is computed of it element by element is right in the sampled places.
        """
        flat = np.zeros(math.prod(self.shape), np.float32)
        flat[:: self.stride] = self.values
        return flat.reshape(self.shape)

    def pair(self, tensor: Array) -> tuple[Array, Array]:
        """The golden values and those of `tensor` in the same places, in float64.

        Raises:
            BundleError: the tensor has another shape.
        """
        if tuple(tensor.shape) != self.shape:
            raise BundleError(
                f"the goldens are of shape {self.shape}, the bundle draws {tuple(tensor.shape)}",
                hint="convert the checkpoint again",
            )
        golden = np.array(self.values, np.float32).astype(np.float64)
        return golden, np.asarray(tensor, np.float64).ravel()[:: self.stride]


def apart(sample: Sample, tensor: Array) -> float:
    """The largest difference."""
    golden, found = sample.pair(tensor)
    return float(np.abs(golden - found).max())


def snr_db(sample: Sample, tensor: Array) -> float:
    """The golden values' power over that of the differences, in dB; infinite where there are none."""
    golden, found = sample.pair(tensor)
    error, signal = float(np.sum((golden - found) ** 2)), float(np.sum(golden**2))
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal else -math.inf
