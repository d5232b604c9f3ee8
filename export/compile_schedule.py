"""diffusers' schedulers -> compiled schedules, each proven on a trajectory before it is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ..stages.errors import CheckpointError, UsageError, refuse_unknown
from .compiled_schedule import CompiledSchedule, ScheduleRow
from .scheduler import SCHEDULERS, build_scheduler, kept_in_double, noise_from, set_timesteps, step_arguments
from .solver import read_noise_levels, read_steps, single_latent_form

if TYPE_CHECKING:
    from torch import Tensor

# How far the replay, rounding in float32, may be from diffusers, relative to the largest latent. Seen: up to 5e-6.
AGREEMENT: Final = 1e-5


def compile_schedule(
    config: Mapping[str, Any],
    scheduler: str,
    steps: int,
    *,
    eta: float = 0.0,
    pipeline: str = "StableDiffusionPipeline",
    timesteps: tuple[int, ...] = (),
) -> CompiledSchedule:
    """Read the coefficients of `scheduler` at `steps` steps off diffusers' own class, and prove them on a trajectory.

    The betas, prediction type, timestep spacing and offset are the checkpoint's. The result is what
    `PIPELINE(scheduler=CLASS.from_config(config))` does, its repairs of outdated configurations (steps_offset 1)
    included. Where the configuration says nothing of clipping there is none: StableDiffusionPipeline switches off what
    DDIMScheduler has on by default, which is meant for pixels, and other pipelines forget to.

    Args:
        config: the checkpoint's scheduler_config.json.
        scheduler: a key of `SCHEDULERS`.
        steps: denoising steps; LCM and TCD allow at most `original_inference_steps` (50).
        eta: stochasticity of DDIM and TCD, 0..1; the pipeline's default is 0. Others take no eta.
        pipeline: the diffusers class that holds the scheduler.
        timesteps: `steps` of them, falling, in place of the scheduler's own choice; not every class takes them.
    Raises:
        UsageError: no such scheduler, or it cannot do so many steps.
        CheckpointError: the configuration makes steps nonlinear, or the replay differs from diffusers.
    """
    refuse_unknown([scheduler], SCHEDULERS, "scheduler", UsageError)
    if steps < 1:
        raise UsageError(f"{steps} steps were asked for", hint="at least 1")
    instance = build_scheduler(config, scheduler, pipeline)
    extra = step_arguments(instance, eta)
    if timesteps and len(timesteps) != steps:
        raise UsageError(f"{len(timesteps)} timesteps were given for {steps} steps", hint="give one a step")
    if eta and "eta" not in extra:
        raise UsageError(f"scheduler {scheduler!r} has no eta, {eta} was asked for", hint="leave eta at 0")
    try:
        set_timesteps(instance, steps, timesteps)
        coefficients, input_scales = read_steps(instance, extra)
        levels = read_noise_levels(instance, steps, timesteps)
    except (ValueError, IndexError, TypeError) as problem:
        raise UsageError(
            f"{SCHEDULERS[scheduler]} cannot do {steps} steps: {problem}", hint="ask for another count"
        ) from problem
    where = f"{SCHEDULERS[scheduler]} at {steps} steps"
    rows = single_latent_form(coefficients, where)
    calls = [float(t) for t in instance.timesteps]
    compiled = CompiledSchedule(
        scheduler=scheduler,
        scheduler_class=SCHEDULERS[scheduler],
        steps=steps,
        eta=eta,
        init_noise_sigma=float(instance.init_noise_sigma),
        prediction_type=str(instance.config.prediction_type),
        timestep_spacing=str(instance.config.timestep_spacing),
        rows=tuple(
            ScheduleRow(timestep, scale, *row, *level)
            for timestep, scale, row, level in zip(calls, input_scales, rows, levels, strict=True)
        ),
    )
    worst = measure_disagreement(config, compiled, pipeline, timesteps)
    if not worst <= AGREEMENT:
        raise CheckpointError(
            f"{where}: the compiled schedule is {worst:.1e} away from diffusers, {AGREEMENT:.0e} is allowed",
            hint="the solver is not linear with this scheduler_config.json; choose another scheduler",
        )
    return compiled


def measure_disagreement(
    config: Mapping[str, Any],
    compiled: CompiledSchedule,
    pipeline: str = "StableDiffusionPipeline",
    timesteps: tuple[int, ...] = (),
) -> float:
    """Worst distance between replay and diffusers over a trajectory, relative to the largest latent of that step.

    The replay runs in float32, as in an app; diffusers runs in double precision, where its own rounding does not
    count: Euler from zero terminal SNR cancels numbers of 4096 down to 18. Both start from the same noise and carry
    their own latents. The stand-in for a UNet is a nonlinear denoiser: without any denoising, LCM's division by
    sqrt(alpha) would amplify rounding errors fifteenfold.
    """
    import torch

    scheduler = build_scheduler(config, compiled.scheduler, pipeline)
    extra = step_arguments(scheduler, compiled.eta)
    generator = torch.Generator().manual_seed(0)
    drawn: list[NDArray[np.float32]] = []

    def draw(shape: Any, **_: object) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        drawn.append(noise.numpy())
        return noise.double()

    set_timesteps(scheduler, compiled.steps, timesteps)
    latents = draw((1, 4, 8, 8)) * scheduler.init_noise_sigma
    replayed = latents.numpy().astype(np.float32)
    outputs: list[NDArray[np.float32]] = []
    worst = 0.0
    with noise_from(scheduler, draw), kept_in_double():
        for timestep, row in zip(scheduler.timesteps, compiled.rows, strict=True):
            seen = scheduler.scale_model_input(latents, timestep)
            output = torch.from_numpy(_stand_in(seen.numpy(), row, compiled.prediction_type))
            latents = scheduler.step(output, timestep, latents, **extra)[0]
            outputs.insert(0, _stand_in(row.input_scale * replayed, row, compiled.prediction_type))
            replayed = row.step(replayed, outputs, drawn[-1] if row.noise else None)
            distance = float(np.abs(replayed - latents.numpy()).max() / np.abs(latents.numpy()).max())
            worst = max(worst, distance if np.isfinite(distance) else np.inf)
    return worst


def _stand_in(seen: NDArray[Any], row: ScheduleRow, prediction_type: str) -> NDArray[Any]:
    """What a UNet would return if tanh(seen) were the clean latents (v: Salimans & Ho 2022, appendix D)."""
    total = math.hypot(row.signal, row.noise_level)
    signal, level = row.signal / total, row.noise_level / total
    clean: NDArray[Any] = np.tanh(seen)
    noise: NDArray[Any] = (seen - signal * clean) / level
    v: NDArray[Any] = signal * noise - level * clean
    return {"epsilon": noise, "v_prediction": v}.get(prediction_type, clean)
