"""Calibration samples for whoever rounds by them: drawn once for a checkpoint, a few prompts a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...stages.artifacts import Checkpoint
from ...stages.errors import UnsupportedPrecision, UsageError
from ...stages.stage import Runner

if TYPE_CHECKING:
    from ...quantize.plan import Plan
    from ...quantize.rounding import Rounding
    from ...quantize.samples import Samples
    from ...runtimes.protocol import Target
    from .probes import ProbePlan


def draw_samples(checkpoint: Checkpoint, size: tuple[int, int], rounding: Rounding, run: Runner) -> Samples:
    """Run PyTorch along the trajectories of the calibration prompts; what was drawn before is not again."""
    from .calibration import VAE_SIDE, calibration_plans, is_cheap

    plans = calibration_plans(checkpoint, size, rounding.prompts)
    return replace(
        _drawn(checkpoint, size, plans, run),
        vae_side=0 if is_cheap(checkpoint, size) else VAE_SIDE,
        vae_pixels=checkpoint.vae_scale,
    )


def draw_for_tuning(checkpoint: Checkpoint, size: tuple[int, int], rounding: Rounding, run: Runner) -> Samples:
    """As `draw_samples`, along the many more trajectories that scales are fitted to."""
    from .calibration import tuning_plans

    return _drawn(checkpoint, size, tuning_plans(checkpoint, size, rounding.prompts), run, "for tuning")


def _drawn(
    checkpoint: Checkpoint, size: tuple[int, int], plans: Sequence[ProbePlan], run: Runner, form: str = ""
) -> Samples:
    from ...quantize.samples import Samples
    from .calibration import step_weights
    from .pytorch import ReferenceProbes

    probes = [run(ReferenceProbes(checkpoint, size, plan, form=form)) for plan in plans]
    samples = Samples(tuple(each.folder for each in probes), tuple(each.digest for each in probes))
    times = (float(feeds["timestep"]) for feeds in samples.feeds(checkpoint.denoiser.component) if "timestep" in feeds)
    return replace(samples, weights=step_weights(checkpoint.scheduler, times))


def calibrated(
    plans: Mapping[str, Plan], checkpoint: Checkpoint, size: tuple[int, int], rounding: Rounding, run: Runner
) -> dict[str, Plan]:
    """`plans`, those with integer codes with the samples that their rounding needs.

    Raises:
        UsageError: see `refuse_tuning`.
    """
    if rounding.method == "nearest" or all(plan.is_float for plan in plans.values()):
        return dict(plans)
    refuse_tuning(rounding, checkpoint, size)
    samples = draw_samples(checkpoint, size, rounding, run)
    tuned = draw_for_tuning(checkpoint, size, rounding, run) if rounding.method == "tuned" else None
    return {
        part: plan if plan.is_float else replace(plan, samples=samples, tuned=tuned) for part, plan in plans.items()
    }


def refuse_tuning(rounding: Rounding, checkpoint: Checkpoint, size: tuple[int, int]) -> None:
    """Refuse to fit scales where a UNet call takes seconds, before anything is drawn.

    Raises:
        UsageError: it is asked for, and it would take hours.
    """
    from ...quantize.tuning import BATCH, STEPS
    from .calibration import can_be_tuned

    if rounding.method == "tuned" and not can_be_tuned(checkpoint, size):
        raise UsageError(
            f'[quantize] rounding = "tuned" runs each component {STEPS * BATCH} times forwards and backwards: '
            f"hours, for a UNet of this size at {size[0]}x{size[1]}",
            hint='rounding = "gptq" fits each layer to its own output, and is what a search takes here',
        )


def refuse_activations(target: Target, rounding: Rounding, plans: Mapping[str, Plan]) -> None:
    """Refuse a way of rounding activations that `target` does not have, before anything is built.

    Raises:
        UnsupportedPrecision: it is asked for, and a scheme has activations of 8 bits.
    """
    from ...runtimes.registry import TARGETS, get_target

    wanted = rounding.activations
    if wanted and wanted not in target.activations and any(_rounds_activations(plan) for plan in plans.values()):
        able = [f"--target {name}" for name in TARGETS if wanted in get_target(name).activations]
        raise UnsupportedPrecision(
            f"target {target.name!r} has no {wanted} rounding of activations",
            hint=f"[quantize] activations: {', '.join(target.activations) or 'neither'}; or leave the key out; "
            f"{wanted} runs on {' and '.join(able)}",
        )


def ranged(
    plans: Mapping[str, Plan],
    checkpoint: Checkpoint,
    target: Target,
    size: tuple[int, int],
    rounding: Rounding,
    run: Runner,
) -> dict[str, Plan]:
    """`plans`, those with activations of 8 bits with the ranges that `target` rounds them over, if it does."""
    from ...quantize.ranges import layer_ranges

    way = rounding.activations or "".join(target.activations[:1])
    if way != "static" or not any(_rounds_activations(plan) for plan in plans.values()):
        return dict(plans)
    samples, method = draw_samples(checkpoint, size, rounding, run), rounding.ranges
    return {
        part: replace(plan, ranges=layer_ranges(checkpoint.components[part], samples, method, run))
        if _rounds_activations(plan)
        else plan
        for part, plan in plans.items()
    }


def _rounds_activations(plan: Plan) -> bool:
    return any(scheme.activation_bits == 8 for scheme in plan.schemes)
