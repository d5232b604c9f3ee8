"""A low-rank branch in float16 beside integer codes: W = up down + rest, and only the rest is rounded.

SVDQuant: "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models" (Li et al., ICLR 2025,
arXiv:2411.05007), section 4.2: the branch is the truncated SVD of the weight, so that the rest has smaller values,
hence smaller scales. It also spares activations of 4 bits; ours stay floats.

LQER: "LQER: Low-Rank Quantization Error Reconstruction for LLMs" (Zhang et al., ICML 2024, arXiv:2402.02446): the
branch is the truncated SVD of what rounding has left, scaled by what enters the layer. It needs a calibration: `gptq`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ..stages.errors import ModelError
from .cast import to_float16

if TYPE_CHECKING:
    from torch import Tensor

UP: Final = ".low_rank.up"  # behind the name of a parameter: float16 [O, rank]
DOWN: Final = ".low_rank.down"  # float16 [rank, K]
_DENSE_TO: Final = 256  # the lesser side: up to it a full SVD is as fast as an iterative one
_DAMPING: Final = 1e-4  # of the mean diagonal: moments of inputs that go together have no root of their own


@dataclass(frozen=True, slots=True)
class Branch:
    """The two factors of a matrix [O, K] of low rank."""

    up: NDArray[np.float16]  # [O, rank]
    down: NDArray[np.float16]  # [rank, K]

    def product(self) -> NDArray[np.float32]:
        """The matrix [O, K], summed in float32."""
        return np.asarray(self.up.astype(np.float32) @ self.down.astype(np.float32))


def split(
    array: NDArray[Any], rank: int, name: str, moments: Sequence[Tensor] | None = None
) -> tuple[Branch, NDArray[np.float32]]:
    """A branch of `rank` for a weight [O, ...], and what it leaves: array - product, float32, of the array's shape.

    Of all of its rank it leaves the least: of squares, or of squares at the output of the layer if `moments` are given.
    With the left singular vectors U of the scaled weight, up = U and down = U^T W: the same as to undo the scaling.

    Args:
        moments: E[x x^T] of what enters the layer, see `moments.measure_moments`.
    Raises:
        ModelError: a value is not finite, or beyond float16; `name` says whose.
    """
    rows = np.ascontiguousarray(array, np.float32).reshape(len(array), -1)
    if not np.isfinite(rows).all():
        raise ModelError(f"{name} holds a NaN or an infinity", hint="the checkpoint is damaged; no conversion mends it")
    directions = _left_vectors(rows if moments is None else _at_output(rows, moments), rank)
    down = directions.T @ rows
    # a share of each singular value to either side, so that neither leaves the normal range of float16
    share = np.sqrt(np.maximum(np.linalg.norm(down, axis=1), np.finfo(np.float32).tiny))
    branch = Branch(to_float16(directions * share, name), to_float16(down / share[:, None], name))
    return branch, (rows - branch.product()).reshape(array.shape)


def _at_output(rows: NDArray[np.float32], moments: Sequence[Tensor]) -> NDArray[np.float32]:
    """`rows` [O, K] times a square root of the moments: its squares are those of the layer's output."""
    scaled, start = np.empty_like(rows), 0
    for matrix in moments:
        end = start + len(matrix)
        wide = matrix.numpy().astype(np.float64)
        wide[np.diag_indices(len(wide))] += _DAMPING * wide.diagonal().mean() or 1.0  # none where nothing enters
        scaled[:, start:end] = rows[:, start:end] @ np.linalg.cholesky(wide)
        start = end
    return scaled


def _left_vectors(matrix: NDArray[np.float32], rank: int) -> NDArray[np.float32]:
    """The left singular vectors [O, rank] of the largest singular values, float32."""
    from scipy.linalg import svd
    from scipy.sparse.linalg import svds

    if not matrix.any():
        return np.eye(len(matrix), rank, dtype=np.float32)
    if min(matrix.shape) <= max(_DENSE_TO, 2 * rank):
        vectors = svd(matrix.astype(np.float64), full_matrices=False)[0][:, :rank]
    else:
        # from a start that is always the same: equal weights give equal bytes
        start = np.random.default_rng(0).standard_normal(min(matrix.shape))
        vectors = svds(matrix, rank, v0=start.astype(np.float32), return_singular_vectors="u")[0][:, ::-1]
    return np.ascontiguousarray(vectors, np.float32)
