"""Rounding a weight so that what its layer computes changes least, not the weight itself.

GPTQ: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (Frantar et al., ICLR 2023,
arXiv:2210.17323), its equations 2 and 3 in the Cholesky form of section 3.3. Inputs are rounded one after the other,
those with the largest second moment first ("act-order" of the authors' code), and the error of each is made up for by
those that are still to come. The scales are those of plain rounding times a factor: every factor is tried, and each
output channel keeps the one with the least output error, which is the true objective and costs nothing later.

Why our own: the libraries that have it (auto-gptq, gptqmodel, neural-compressor, optimum) do linear layers of language
models only, most want a GPU, and none takes convolutions with the groups of three mobile runtimes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from .codes import Codes, round_to_nearest
from .low_rank import split
from .moments import blocks_of, output_error
from .scheme import Scheme, parse_scheme

if TYPE_CHECKING:
    from torch import Tensor

DAMPING: Final = 0.001
"""Of the mean diagonal, added to it. On the demo the output error is 0.2 dB larger at 0.01 (the authors' default)
and 1.3 dB at 0.1: ours averages over far more patches than a language model's calibration has tokens."""

FACTORS: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
"""Against 1.0 alone the output error falls by 1.9 dB (4 bits a channel) on the demo, 1.2 dB (groups of 64)."""

FEW_FACTORS: Final = (1.0, 0.85, 0.7)
"""For layers of more than `_LARGE` weights, which would take minutes each."""

_LARGE: Final = 2**20
_WORK: Final = 2**25  # numbers of one array of the work on a layer: 134 MB
_COLUMNS: Final = 128  # inputs that are rounded before the rest of the row is made up for, as in the paper


@dataclass(frozen=True, slots=True)
class Rounded:
    """Codes, and what they cost: E|D x|^2 of each output channel."""

    codes: Codes
    errors: Any  # numpy float64 [O]


def round_by_output(
    weight: Any, moments: Sequence[Tensor], schemes: Sequence[Scheme], name: str, factors: Sequence[float] | None = None
) -> Mapping[str, Rounded]:
    """Codes of `weight` (numpy, [O, ...]) for each of `schemes`, rounded together since they share the work.

    Args:
        moments: `measure_moments` of the layer, a matrix for each block.
        name: stands for the weight in errors.
        factors: of the scales, to try; None for as many as the layer's size allows.
    Raises:
        ModelError: a weight is not finite.
    """
    import numpy as np
    import torch

    if branched := [scheme for scheme in schemes if scheme.rank]:
        return _round_beside_branches(weight, moments, schemes, branched, name, factors)
    if factors is None:
        factors = FACTORS if weight.size <= _LARGE else FEW_FACTORS
    rows = torch.from_numpy(np.ascontiguousarray(weight, np.float32)).reshape(len(weight), -1)
    nearest = {scheme.name: round_to_nearest(weight, scheme, name) for scheme in schemes}
    prepared = [_prepare(matrix) for matrix in moments]
    step = max(1, _WORK // (rows.shape[1] * len(schemes) * len(factors)))  # output channels do not know each other
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {scheme.name: [] for scheme in schemes}
    for first in range(0, len(rows), step):
        some = slice(first, first + step)
        plain = {
            each: (torch.from_numpy(c.values).reshape(rows.shape)[some].float(), torch.from_numpy(c.scales)[some])
            for each, c in nearest.items()
        }
        found = _round_rows(rows[some], moments, prepared, schemes, factors, plain)
        for scheme, part in zip(schemes, found, strict=True):
            parts[scheme.name].append(part)
    result = {}
    for label, each in parts.items():
        codes, scales, errors = (torch.cat(tensors) for tensors in zip(*each, strict=True))
        values = codes.to(torch.int8).reshape(weight.shape).numpy()
        result[label] = Rounded(Codes(values, scales.numpy()), errors.numpy())
    return result


def _round_beside_branches(
    weight: Any,
    moments: Sequence[Tensor],
    schemes: Sequence[Scheme],
    branched: Sequence[Scheme],
    name: str,
    factors: Sequence[float] | None,
) -> Mapping[str, Rounded]:
    """As `round_by_output`, where some schemes have a branch.

    Two ways are gone, and the one with the less output error is kept: codes of the weight, or, where a few directions
    hold outliers, of what its truncated SVD leaves. Either way the branch is in the end the best for these codes.
    """
    import torch

    plain = [scheme for scheme in schemes if not scheme.rank]
    found = dict(round_by_output(weight, moments, plain, name, factors)) if plain else {}
    for rank in dict.fromkeys(scheme.rank for scheme in branched):
        bare = {scheme.without_branch: scheme.name for scheme in branched if scheme.rank == rank}
        for start in (weight, split(weight, rank, name)[1]):
            rounded = round_by_output(start, moments, [parse_scheme(each) for each in bare], name, factors)
            for each, result in rounded.items():
                branch, miss = split(weight - result.codes.residual(), rank, name, moments)
                errors = output_error(torch.from_numpy(miss).reshape(len(miss), -1), moments).numpy()
                if bare[each] not in found or errors.sum() < found[bare[each]].errors.sum():
                    found[bare[each]] = Rounded(replace(result.codes, branch=branch), errors)
    return {scheme.name: found[scheme.name] for scheme in schemes}


def _round_rows(
    rows: Tensor,
    moments: Sequence[Tensor],
    prepared: Sequence[tuple[Tensor, Tensor]],
    schemes: Sequence[Scheme],
    factors: Sequence[float],
    plain: Mapping[str, tuple[Tensor, Tensor]],
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each scheme: codes [O, K], scales [O, G] and errors [O] of some rows, the best of all factors in each."""
    import torch

    count, row = rows.shape
    tries = [(scheme, plain[scheme.name][1] * factor) for scheme in schemes for factor in factors]
    scales = torch.cat([each.repeat_interleave(row // each.shape[1], 1) for _, each in tries])  # [T * O, K]
    top = torch.tensor([float(scheme.top) for scheme, _ in tries]).repeat_interleave(count)
    codes = _round(rows, prepared, scales, top).view(len(tries), count, row)
    scales = scales.view(len(tries), count, row)
    errors = torch.stack([output_error(c * s - rows, moments) for c, s in zip(codes, scales, strict=True)])  # [T, O]
    result, each_row = [], torch.arange(count)
    for index, scheme in enumerate(schemes):
        span = slice(index * len(factors), (index + 1) * len(factors))
        least, best = errors[span].min(0)
        picked = codes[span][best, each_row]
        chosen = torch.stack([each for _, each in tries[span]])[best, each_row]
        # plain rounding is one of the candidates: a method may not make it worse
        values, steps = plain[scheme.name]
        plain_errors = output_error(values * steps.repeat_interleave(row // steps.shape[1], 1) - rows, moments)
        worse = least > plain_errors
        picked[worse], chosen[worse] = values[worse], steps[worse]
        result.append((picked, chosen, torch.minimum(least, plain_errors)))
    return result


def _round(rows: Tensor, prepared: Sequence[tuple[Tensor, Tensor]], scales: Tensor, top: Tensor) -> Tensor:
    """Codes [T * O, K] of T copies of `rows` [O, K], each with its own scales and largest code."""
    import torch

    copies = len(scales) // len(rows)
    codes = torch.empty_like(scales)
    for (order, upper), (start, end) in zip(prepared, blocks_of(rows.shape[1]), strict=True):
        left = rows[:, start:end][:, order].repeat(copies, 1)
        scale = scales[:, start:end][:, order]
        done = torch.empty_like(left)
        for first in range(0, len(order), _COLUMNS):
            last = min(first + _COLUMNS, len(order))
            part = left[:, first:last]
            misses = torch.empty_like(part)
            for column in range(last - first):
                at = first + column
                step = scale[:, at]
                code = (part[:, column] / step).round_()
                code = torch.minimum(torch.maximum(code, -top), top)
                miss = (part[:, column] - code * step) / upper[at, at]
                part[:, column:] -= miss[:, None] * upper[at, at:last]
                done[:, at], misses[:, column] = code, miss
            left[:, last:] -= misses @ upper[first:last, last:]
        codes[:, start:end][:, order] = done
    return codes


def _prepare(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The order of a block's inputs, and the factor that tells how to make up for their errors in that order."""
    import torch

    order = torch.argsort(matrix.diagonal(), descending=True, stable=True)
    return order, _inverse_factor(matrix[order][:, order])


def _inverse_factor(matrix: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped `matrix`, computed in float64, float32 for the loop."""
    import torch

    wide = matrix.double()
    diagonal = wide.diagonal()
    mean = diagonal.mean()
    # an input that is always zero has no say; without a moment of its own its column would not be invertible
    diagonal += DAMPING * mean if mean > 0 else 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
