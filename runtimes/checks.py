"""Feeds and results are checked before and after native code sees them: most of it would compute garbage silently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from ..quantize.plan import Plan
from ..quantize.scheme import Scheme
from ..stages.artifacts import TensorSpec
from ..stages.errors import FeedError, ToolCrashed, UnsupportedPrecision
from .protocol import Array, Feeds, Target

# Activations of Stable Diffusion stay below a few hundred. MNN answers damaged weights with ±3.4e38.
SANE_MAGNITUDE: Final = 1e6


def checked_feeds(feeds: Feeds, inputs: Sequence[TensorSpec], model: str) -> dict[str, Array]:
    """`feeds` as contiguous arrays in the order of `inputs`.

    Raises:
        FeedError: a name is missing or unknown, a dtype or shape differs, or a value is NaN or infinite.
    """
    wanted = [spec.name for spec in inputs]
    if sorted(feeds) != sorted(wanted):
        raise FeedError(f"{model} takes {', '.join(wanted)}; it was given {', '.join(sorted(feeds)) or 'nothing'}")
    checked = {}
    for spec in inputs:
        array = np.asarray(feeds[spec.name])
        if array.dtype.name != spec.dtype or array.shape != spec.shape:
            raise FeedError(
                f"{model}: {spec.name} is {array.dtype.name}{list(array.shape)}, "
                f"it takes {spec.dtype}{list(spec.shape)}"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int(array.size - np.isfinite(array).sum())
            raise FeedError(f"{model}: {spec.name} holds {bad} NaN or infinite of {array.size} values")
        # ascontiguousarray would turn the scalar [] into [1]
        checked[spec.name] = np.array(array, order="C", copy=None)
    return checked


def checked_results(results: Feeds, outputs: Sequence[TensorSpec], model: str) -> dict[str, Array]:
    """`results` as they are, if they are what the model promises.

    Raises:
        ToolCrashed: an output is missing, has another dtype or shape, or values that no picture model produces.
    """
    for spec in outputs:
        if spec.name not in results:
            raise ToolCrashed(f"{model} gave no {spec.name}; it gave {', '.join(results) or 'nothing'}")
        array = results[spec.name]
        if array.dtype.name != spec.dtype or array.shape != spec.shape:
            raise ToolCrashed(
                f"{model}: {spec.name} came as {array.dtype.name}{list(array.shape)}, "
                f"not {spec.dtype}{list(spec.shape)}"
            )
        peak = float(np.abs(array).max(initial=0.0))
        if not peak < SANE_MAGNITUDE:  # also true for NaN
            raise ToolCrashed(
                f"{model}: {spec.name} reaches {peak:.3g}: the weights or the computation are broken",
                hint="run `diffusette verify` on the bundle; if it is whole, convert again and report this",
            )
    return {spec.name: results[spec.name] for spec in outputs}


def refuse_schemes(target: Target, component: str, plan: Plan) -> None:
    """Refuse what a runtime does not execute before anything is built.

    Raises:
        UsageError: a name in the plan is no scheme.
        UnsupportedPrecision: a scheme of the plan is not one of the target's (the hint lists these), or it does not
            hold them side by side.
    """
    for scheme in plan.schemes:
        if scheme.without_branch not in target.precisions:
            raise UnsupportedPrecision(
                f"target {target.name!r} does not run {component} at {scheme.name!r}",
                hint=f"it runs: {', '.join(target.precisions)}{_who_runs(scheme)}",
            )
        if scheme.rank and not target.low_rank:
            raise UnsupportedPrecision(
                f"a low-rank branch, as in {scheme.name!r}, is not built for target {target.name!r}",
                hint=f"use {scheme.without_branch}{_who_runs(scheme)}",
            )
        if scheme.rank and scheme.activation_bits == 8:
            raise UnsupportedPrecision(
                f"{component} at {scheme.name!r}: a low-rank branch goes with float activations only",
                hint=f"use {scheme.without_branch}, or a scheme of 4 bits that ends in _afp with the branch",
            )
    if plan.is_float and len(plan.schemes) > 1 and not target.mixes_floats:
        raise UnsupportedPrecision(
            f"target {target.name!r} does not mix fp32 and fp16 inside {component}",
            hint=f"a rule that takes all of it, with one of: {', '.join(target.precisions)}",
        )
    if not plan.is_float and any(scheme.computes_half for scheme in plan.schemes):
        raise UnsupportedPrecision(
            f"{component} at {plan.label}: float16 is not computed beside integer codes",
            hint="fp16 or fp32 in place of fp16_a16; or rules of these two beside fp16_a16, without integers",
        )
    coded = [scheme for scheme in plan.schemes if not scheme.is_float]
    if len({scheme.activation_bits for scheme in coded}) > 1 and not target.mixes_activations:
        raise UnsupportedPrecision(
            f"target {target.name!r} rounds the activations of all of {component} or of none: {plan.label}",
            hint="one of w8c_a8 and the schemes that end in _afp for all of it; fp16 may stand beside either",
        )


def _who_runs(scheme: Scheme) -> str:
    """The targets that have `scheme`, with its low-rank branch if it has one, for the end of a hint."""
    from .registry import TARGETS, get_target

    targets = {name: get_target(name) for name in TARGETS}
    able = [
        f"--target {name}"
        for name, target in targets.items()
        if scheme.without_branch in target.precisions
        and (not scheme.rank or (target.low_rank and scheme.activation_bits != 8))
    ]
    return f"; {scheme.name} runs on {' and '.join(able)}" if able else ""
