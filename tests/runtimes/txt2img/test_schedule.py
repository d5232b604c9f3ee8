"""A trajectory replayed with numpy is the one that diffusers walks, noise included."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Final

import diffusers
import numpy as np
import pytest
import torch
from diffusette.export.compile_schedule import compile_schedule
from diffusette.export.scheduler import SCHEDULERS
from diffusette.runtimes.txt2img.noise import TorchNoise
from diffusette.runtimes.txt2img.trajectory import Trajectory

CONFIG: Final = json.loads((Path(__file__).resolve().parents[3] / "demo/scheduler/scheduler_config.json").read_text())
SHAPE: Final = (1, 4, 8, 8)


def model(seen: np.ndarray) -> np.ndarray:
    return np.tanh(seen) + np.float32(0.2) * np.sin(3 * np.roll(seen, 1, axis=-1))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_trajectory_is_that_of_diffusers_in_float32(scheduler: str) -> None:
    compiled = compile_schedule(CONFIG, scheduler, 10)
    reference = getattr(diffusers, compiled.scheduler_class).from_config(CONFIG)
    reference.set_timesteps(10)
    generator = torch.Generator("cpu").manual_seed(5)
    offered = {"generator": generator, "eta": 0.0, "return_dict": False}
    more = {name: value for name, value in offered.items() if name in inspect.signature(reference.step).parameters}
    latents = torch.randn(SHAPE, generator=generator) * reference.init_noise_sigma
    trajectory = Trajectory(compiled, SHAPE, TorchNoise(5).normal)
    for timestep, row in zip(reference.timesteps, compiled.rows, strict=True):
        assert row.timestep == float(timestep)
        output = model(reference.scale_model_input(latents, timestep).numpy())
        latents = reference.step(torch.from_numpy(output), timestep, latents, **more)[0]
        trajectory.step(row, model(trajectory.seen(row)))
        assert trajectory.latents.dtype == np.float32
        assert np.abs(trajectory.latents - latents.numpy()).max() <= 1e-5 * latents.abs().max()
