"""A solver's coefficients, read off diffusers' own class by running it on basis vectors.

No solver's formula is written here. A scheduler's `step` is linear in its tensors, so it is run with tensors that are
unit vectors of one space, spanned by every step's latents, model output and noise; what comes out are coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ..stages.errors import CheckpointError
from .scheduler import kept_in_double, noise_from, set_timesteps

if TYPE_CHECKING:
    from torch import Tensor

Coefficients = NDArray[np.float64]

# Trailing coefficients of earlier outputs below this share of the largest are dropped: far below float32's 6e-8.
NEGLIGIBLE: Final = 1e-9


def read_steps(scheduler: Any, extra: Mapping[str, Any]) -> tuple[Coefficients, list[float]]:
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

    with noise_from(scheduler, draw), kept_in_double():
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


def single_latent_form(coefficients: Coefficients, where: str) -> list[tuple[float, tuple[float, ...], float]]:
    """Rewrite steps that look back at earlier latents, so that each uses its own latent only.

    Multistep solvers keep x0 predictions made from earlier latents. Those are replaced, the oldest first, through the
    step that came after them: x_j = (x_{j+1} - (outputs and noise of step j)) / latent_j.

    Args:
        coefficients: [n, 3n] from `read_steps`; not changed.
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
            which = "its last step" if call == calls - 1 else f"step {call}"
            raise CheckpointError(f"{where}: {which} ignores the model")
        kept = tuple(float(value) for value in outputs[: used[-1] + 1])
        rows.append((float(row[call]), kept, float(row[2 * calls + call])))
    return rows


def read_noise_levels(scheduler: Any, steps: int, timesteps: tuple[int, ...]) -> list[tuple[float, float]]:
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
