"""Weights that can be recognised wherever a converter puts them.

A converter moves weights from a file with names to one without. To learn where each went, it is given *fingerprints*:
every parameter is filled from its own range of consecutive float32 bit patterns, so that any one element tells
which parameter it comes from, and its neighbours tell how the axes lie. The tensors are windows on a vector that
overlap with themselves (torch `as_strided`), so a UNet of 3.4 GB takes a few megabytes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from itertools import permutations
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ..stages.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor

# From 2^-15 up: normal numbers, small enough that a forward pass stays finite. None is 0 or 1, which a converter
# might fold away. An octave holds 2^23 patterns; SD 1.5's UNet needs about one.
FIRST: Final = 0x38000000
LAST: Final = 0x3F000000  # 0.5
STRIDES: Final = (1, 2, 3, 5, 7)  # all different, so that no two axes can be swapped unseen


class Fingerprints:
    """A range of float32 bit patterns per parameter.

    Args:
        shapes: parameter name -> shape, in any order; the same mapping gives the same patterns.
    Raises:
        ExportError: float32 has too few patterns for them.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        self._names = list(shapes)
        lengths = [_length(shape) for shape in shapes.values()]
        self._starts = [FIRST, *(FIRST + np.cumsum(lengths, dtype=np.int64)).tolist()]
        if self._starts[-1] > LAST:
            raise ExportError(f"{len(shapes)} parameters need {sum(lengths)} fingerprints, there are {LAST - FIRST}")

    def _window(self, name: str) -> NDArray[np.uint32]:
        index = self._names.index(name)
        return np.arange(self._starts[index], self._starts[index + 1], dtype=np.uint32)

    def stub(self, name: str) -> Tensor:
        """The fingerprint of a parameter as a float32 tensor of its shape, with almost no memory behind it."""
        import torch

        shape = self.shapes[name]
        return torch.from_numpy(self._window(name).view(np.float32)).as_strided(shape, STRIDES[: len(shape)])

    def patterns(self, name: str) -> NDArray[np.uint32]:
        """The same as bit patterns, a read-only view."""
        shape = self.shapes[name]
        strides = tuple(4 * stride for stride in STRIDES[: len(shape)])
        return np.lib.stride_tricks.as_strided(self._window(name), shape, strides, writeable=False)

    def owner(self, pattern: int) -> str | None:
        """The parameter whose range holds a bit pattern."""
        index = bisect_right(self._starts, pattern) - 1
        return self._names[index] if 0 <= index < len(self._names) else None

    def any_in(self, patterns: NDArray[np.uint32]) -> bool:
        """Whether any of `patterns` may come from a parameter."""
        return bool(((patterns >= FIRST) & (patterns < self._starts[-1])).any())

    def recognise(self, patterns: NDArray[np.uint32]) -> tuple[str, tuple[int, ...]] | None:
        """The parameter that a flat array holds whole, and the order in which its axes were written.

        Returns:
            (name, axes), so that `patterns == parameter.transpose(axes).ravel()` element for element; None when
            the array is no parameter, a part of one, or several.
        """
        name = self.owner(int(patterns[0])) if patterns.size else None
        if name is None or patterns.size != math.prod(self.shapes[name]):
            return None
        expected = self.patterns(name)
        for axes in permutations(range(expected.ndim)):  # the unchanged order comes first
            view = expected.transpose(axes)
            if np.array_equal(view, patterns.reshape(view.shape)):
                return name, axes
        return None


def _length(shape: tuple[int, ...]) -> int:
    if len(shape) > len(STRIDES):
        raise ExportError(f"a parameter of shape {list(shape)} has more than {len(STRIDES)} axes")
    return 1 + sum(stride * (size - 1) for stride, size in zip(STRIDES, shape, strict=False))
