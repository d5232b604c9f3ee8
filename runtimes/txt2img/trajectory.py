"""Replaying a compiled schedule: from noise to latents, one model call at a time, in numpy float32."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ...export.compiled_schedule import CompiledSchedule, ScheduleRow

Latents = NDArray[np.float32]
Normal = Callable[[Sequence[int]], Latents]  # shape -> fresh standard normal noise, `TorchNoise.normal`


class Trajectory:
    """Latents on their way, and the few earlier model outputs that the solver looks back at.

    for row in schedule.rows:
        trajectory.step(row, model(trajectory.seen(row), row.timestep))
    """

    def __init__(
        self, schedule: CompiledSchedule, shape: Sequence[int], normal: Normal, start: Latents | None = None
    ) -> None:
        """Start from noise, or from latents `start` that belong to the first row that will be run."""
        self.latents: Latents = schedule.init_noise_sigma * normal(shape) if start is None else start
        self._outputs: deque[Latents] = deque(maxlen=schedule.history)
        self._normal = normal

    def seen(self, row: ScheduleRow) -> Latents:
        """What the model is shown at `row`, of the latents' shape."""
        return row.input_scale * self.latents

    def step(self, row: ScheduleRow, output: Latents) -> None:
        """Take the model's `output` at `row`, draw noise if the row wants any, move on to the next latents."""
        self._outputs.appendleft(output)
        noise = self._normal(self.latents.shape) if row.noise else None
        self.latents = row.step(self.latents, list(self._outputs), noise)
