"""Integer codes and scales of one weight, and plain rounding to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..stages.errors import ModelError
from .low_rank import Branch, split
from .scheme import Scheme, parse_scheme


@dataclass(frozen=True, slots=True)
class Codes:
    """A weight as integers: value = code * scale, plus that of a low-rank branch.

    `values` has the shape of the parameter, [O, ...]. In row `o`, flattened, code `k` takes `scales[o, k // (K / G)]`.
    """

    values: NDArray[np.int8]  # [O, ...], within +-(2^(bits-1) - 1), or to -2^(bits-1)
    scales: NDArray[np.float32]  # [O, G]
    branch: Branch | None = None

    def dequantised(self) -> NDArray[np.float32]:
        """The float32 values, of the parameter's shape, as the runtimes compute them."""
        values = self.residual()
        if self.branch is not None:
            values += self.branch.product().reshape(values.shape)
        return values

    def residual(self) -> NDArray[np.float32]:
        """The part of the codes: one float32 product each."""
        rows, groups = self.scales.shape
        wide = self.values.reshape(rows, groups, -1).astype(np.float32)
        wide *= self.scales[:, :, None]
        return wide.reshape(self.values.shape)


def round_to_nearest(array: NDArray[Any], scheme: Scheme, name: str) -> Codes:
    """Codes of `array` [O, ...]: scale = max|group| / (2^(bits-1) - 1), code = the nearest integer.

    With a branch, its factors are those of the weight alone, and the codes are those of what they leave.

    Raises:
        ModelError: a value is not finite; `name` says whose.
    """
    if scheme.rank:
        branch, rest = split(array, scheme.rank, name)
        return replace(round_to_nearest(rest, parse_scheme(scheme.without_branch), name), branch=branch)
    rows = np.ascontiguousarray(array, np.float32).reshape(array.shape[0], scheme.groups(array.shape), -1)
    peaks = np.abs(rows).max(axis=2)
    if not np.isfinite(peaks).all():
        raise ModelError(f"{name} holds a NaN or an infinity", hint="the checkpoint is damaged; no conversion mends it")
    scales = (peaks / np.float32(scheme.top)).astype(np.float32)
    scales[scales < np.finfo(np.float32).tiny] = 1.0  # nothing but zeros: any scale will do, and none divides by it
    codes = np.rint(rows / scales[:, :, None])
    np.clip(codes, -scheme.top, scheme.top, out=codes)
    return Codes(codes.astype(np.int8).reshape(array.shape), scales)
