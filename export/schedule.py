"""diffusers' schedulers -> compiled schedules, by running the schedulers on basis vectors.

No solver's formula is written here. A scheduler's `step` is linear in its tensors, so it is run with tensors that are
unit vectors of one space, spanned by every step's latents, model output and noise; what comes out are coefficients.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ..pipeline.errors import CheckpointError, UsageError, refuse_unknown
from ..pipeline.schedule import CompiledSchedule, ScheduleRow

if TYPE_CHECKING:
    from torch import Tensor

Coefficients = NDArray[np.float64]

SCHEDULERS: Final = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}

# What the constructors of diffusers' pipelines set in a scheduler's configuration, where it has the key; all others
# take it as it is.
_REPAIRS: Final[Mapping[str, Mapping[str, Any]]] = {
    "StableDiffusionPipeline": {"steps_offset": 1},
    "StableDiffusionImg2ImgPipeline": {"steps_offset": 1},
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}

# Settings that make a step nonlinear. Neither suits latents, which are not confined to -1..1.
NONLINEAR: Final = ("clip_sample", "thresholding")

# Trailing coefficients of earlier outputs below this share of the largest are dropped: far below float32's 6e-8.
NEGLIGIBLE: Final = 1e-9

# How far the replay, rounding in float32, may be from diffusers, relative to the largest latent. Seen: up to 5e-6.
AGREEMENT: Final = 1e-5


def default_scheduler(config: Mapping[str, Any]) -> str:
    """Our name of the checkpoint's own scheduler class.

    Raises:
        CheckpointError: scheduler_config.json names a class that cannot be compiled.
    """
    own = config.get("_class_name")
    for name, scheduler_class in SCHEDULERS.items():
        if scheduler_class == own:
            return name
    raise CheckpointError(
        f"scheduler_config.json: _class_name {own!r} cannot be compiled",
        hint=f"choose a scheduler: {', '.join(SCHEDULERS)}",
    )


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
    extra = _step_arguments(instance, eta)
    if timesteps and len(timesteps) != steps:
        raise UsageError(f"{len(timesteps)} timesteps were given for {steps} steps", hint="give one a step")
    if eta and "eta" not in extra:
        raise UsageError(f"scheduler {scheduler!r} has no eta, {eta} was asked for", hint="leave eta at 0")
    try:
        set_timesteps(instance, steps, timesteps)
        coefficients, input_scales = _probe(instance, extra)
        levels = _noise_levels(instance, steps, timesteps)
    except (ValueError, IndexError, TypeError) as problem:
        raise UsageError(
            f"{SCHEDULERS[scheduler]} cannot do {steps} steps: {problem}", hint="ask for another count"
        ) from problem
    where = f"{SCHEDULERS[scheduler]} at {steps} steps"
    rows = _single_latent_form(coefficients, where)
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


def build_scheduler(config: Mapping[str, Any], name: str, pipeline: str = "StableDiffusionPipeline") -> Any:
    """diffusers' scheduler as `pipeline` holds it.

    Raises:
        CheckpointError: the configuration makes steps nonlinear, or states no betas.
    """
    import diffusers

    scheduler_class = getattr(diffusers, SCHEDULERS[name])
    for setting in NONLINEAR:
        if config.get(setting) and setting in inspect.signature(scheduler_class).parameters:
            raise CheckpointError(
                f"scheduler_config.json: {setting} is {config[setting]!r}: {name} is not linear with it",
                hint=f"set {setting} to false: it is meant for pixels, not for latents",
            )
    if config.get("beta_schedule") is None and config.get("trained_betas") is None:
        raise CheckpointError(
            "scheduler_config.json has neither beta_schedule nor trained_betas",
            hint="the noise schedule that the UNet was trained with has to be stated there",
        )
    scheduler = scheduler_class.from_config(dict(config))
    repairs = {**dict.fromkeys(NONLINEAR, False), **_REPAIRS.get(pipeline, {})}
    scheduler.register_to_config(**{key: value for key, value in repairs.items() if key in scheduler.config})
    return scheduler


def set_timesteps(scheduler: Any, steps: int, timesteps: tuple[int, ...] = ()) -> None:
    """Prepare `scheduler` for a run, as `retrieve_timesteps` of diffusers' pipelines does."""
    if timesteps:
        scheduler.set_timesteps(timesteps=list(timesteps))
    else:
        scheduler.set_timesteps(steps)


def _step_arguments(scheduler: Any, eta: float) -> dict[str, Any]:
    """Keyword arguments of `step`, as StableDiffusionPipeline.prepare_extra_step_kwargs chooses them."""
    accepted = inspect.signature(scheduler.step).parameters
    offered = {"eta": eta, "return_dict": False}
    return {name: value for name, value in offered.items() if name in accepted}


@contextmanager
def _noise_from(scheduler: Any, draw: Callable[..., Tensor]) -> Iterator[None]:
    """Let `scheduler` take its noise from `draw` instead of diffusers' `randn_tensor`."""
    module = sys.modules[type(scheduler).__module__]
    original = getattr(module, "randn_tensor", None)
    if original is None:  # a deterministic solver: PNDM and UniPC do not even import it
        yield
        return
    setattr(module, "randn_tensor", draw)  # noqa: B010 - the module is only known at run time
    try:
        yield
    finally:
        setattr(module, "randn_tensor", original)  # noqa: B010


@contextmanager
def _kept_in_double() -> Iterator[None]:
    """Undo the `sample.to(torch.float32)` of some schedulers: coefficients are read in double precision."""
    import torch
    from torch.overrides import TorchFunctionMode

    class KeepDouble(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            narrowed = function is torch.Tensor.to and args[0].dtype == torch.float64 and result.dtype == torch.float32
            return args[0] if narrowed else result

    with KeepDouble():
        yield


def _probe(scheduler: Any, extra: Mapping[str, Any]) -> tuple[Coefficients, list[float]]:
    """Run every step on unit vectors.

    Returns:
        [n, 3n] coefficients of each step's result over the latents that were given to steps 0..n-1, the model outputs
        0..n-1 and the noises 0..n-1; and the n input scales.
    """
    import torch

    calls = len(scheduler.timesteps)
    units = torch.eye(3 * calls, dtype=torch.float64).reshape(3 * calls, 1, 3 * calls, 1, 1)  # each [1, 3n, 1, 1]
    results, input_scales, draws = [], [], []

    def draw(*_: object, **__: object) -> Tensor:
        draws.append(call)
        return units[2 * calls + call]

    with _noise_from(scheduler, draw), _kept_in_double():
        for call, timestep in enumerate(scheduler.timesteps):
            latents = units[call]  # a fresh unit vector: earlier latents are then seen apart from this one
            input_scales.append(float(scheduler.scale_model_input(latents, timestep).sum()))
            result = scheduler.step(units[calls + call], timestep, latents, **extra)[0]
            results.append(result.numpy().reshape(-1))
    coefficients = np.stack(results)
    if not np.isfinite(coefficients).all():
        call = int(np.argwhere(~np.isfinite(coefficients))[0, 0])
        raise CheckpointError(
            f"{type(scheduler).__name__}: step {call} of {calls} has a coefficient that is not finite"
        )
    for call in draws:
        if draws.count(call) > 1:
            raise CheckpointError(f"{type(scheduler).__name__}: step {call} draws noise {draws.count(call)} times")
        if coefficients[call, 2 * calls + call] == 0 and call != max(draws):
            raise CheckpointError(f"{type(scheduler).__name__}: step {call} draws noise and does not use it")
    return coefficients, input_scales


def _single_latent_form(coefficients: Coefficients, where: str) -> list[tuple[float, tuple[float, ...], float]]:
    """Rewrite steps that look back at earlier latents, so that each uses its own latent only.

    Multistep solvers keep x0 predictions made from earlier latents. Those are replaced, the oldest first, through the
    step that came after them: x_j = (x_{j+1} - (outputs and noise of step j)) / latent_j.

    Args:
        coefficients: [n, 3n] from `_probe`; not changed.
    Returns:
        latent, outputs (the newest first) and noise coefficient of each step.
    """
    calls = len(coefficients)
    reduced = coefficients.copy()
    rows = []
    for call, row in enumerate(reduced):
        for earlier in range(call):
            share = row[earlier]
            if share == 0:
                continue
            divisor = reduced[earlier, earlier]
            if divisor == 0:
                raise CheckpointError(
                    f"{where}: step {call} needs the latents before step {earlier}, which forgot them"
                )
            row -= share / divisor * reduced[earlier]
            row[earlier] = 0  # exactly, not up to rounding
            row[earlier + 1] += share / divisor
        if row[2 * calls : 2 * calls + call].any():
            raise CheckpointError(
                f"{where}: step {call} uses the noise of an earlier step, which a compiled schedule cannot hold",
                hint="choose another scheduler, or algorithm_type dpmsolver++ in scheduler_config.json",
            )
        outputs = row[calls : calls + call + 1][::-1]
        used = np.flatnonzero(np.abs(outputs) > NEGLIGIBLE * np.abs(outputs).max())
        if not used.size:
            raise CheckpointError(f"{where}: step {call} ignores the model")
        kept = tuple(float(value) for value in outputs[: used[-1] + 1])
        rows.append((float(row[call]), kept, float(row[2 * calls + call])))
    return rows


def _noise_levels(scheduler: Any, steps: int, timesteps: tuple[int, ...]) -> list[tuple[float, float]]:
    """(signal, noise) coefficients of `add_noise` at every row, as StableDiffusionImg2ImgPipeline starts there."""
    import torch

    signal, noise = torch.eye(2, dtype=torch.float64).reshape(2, 1, 2, 1, 1)
    levels = []
    for row in range(len(scheduler.timesteps)):
        set_timesteps(scheduler, steps, timesteps)  # forgets where the last run was
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(row)
        mixed = scheduler.add_noise(signal, noise, scheduler.timesteps[row : row + 1]).reshape(2)
        levels.append((float(mixed[0]), float(mixed[1])))
    return levels


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
    extra = _step_arguments(scheduler, compiled.eta)
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
    with _noise_from(scheduler, draw), _kept_in_double():
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
