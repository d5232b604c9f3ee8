"""A sampling schedule as plain numbers: what a bundle carries instead of a scheduler.

Every solver that users pick is linear, step by step. With the latent x_i, the model's outputs e_i, e_{i-1}, ... and
fresh standard normal noise n_i, all of one shape, model call i is

    e_i     = model(input_scale * x_i, timestep)
    x_{i+1} = latent * x_i + outputs[0] * e_i + outputs[1] * e_{i-1} + ... + noise * n_i

so a schedule is a table of these coefficients, one row a model call (PNDM has one call more than it has steps).
The first latent is init_noise_sigma * n. docs/decisions/0010 tells how the table is made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from ..stages.errors import BundleError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Latents = NDArray[np.float32]

STRICT: Final = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # pydantic's words


@dataclass(frozen=True, slots=True)
class ScheduleRow:
    """The coefficients of one model call; `outputs` holds the current output's first, then earlier ones'.

    `noise` is 0 where no noise is drawn. `signal` and `noise_level` make a picture's latents x into this row's
    starting point, signal * x + noise_level * n, as image-to-image does.
    """

    __pydantic_config__: ClassVar[Mapping[str, object]] = STRICT

    timestep: float
    input_scale: float
    latent: float
    outputs: tuple[float, ...]
    noise: float
    signal: float
    noise_level: float

    def __post_init__(self) -> None:
        numbers = (self.timestep, self.input_scale, self.latent, *self.outputs, self.noise, self.signal)
        if not all(map(math.isfinite, (*numbers, self.noise_level))):
            raise ValueError("a coefficient is not finite")
        if not self.outputs:
            raise ValueError("outputs is empty: the row would ignore the model")

    def step(self, latents: Latents, outputs: Sequence[Latents], noise: Latents | None = None) -> Latents:
        """The next latents, in the dtype of `latents`.

        Args:
            latents: x_i, any shape.
            outputs: the model's outputs so far, the newest first; as many as `self.outputs` or more.
            noise: n_i, standard normal; needed exactly when `self.noise` is not 0.
        """
        if (noise is None) != (self.noise == 0):
            raise ValueError(f"noise coefficient is {self.noise}, noise is {'absent' if noise is None else 'given'}")
        following = self.latent * latents
        for coefficient, output in zip(self.outputs, outputs[: len(self.outputs)], strict=True):
            following = following + coefficient * output
        return following if noise is None else following + self.noise * noise


@dataclass(frozen=True, slots=True)
class CompiledSchedule:
    """A scheduler at one step count. `rows` are in the order of the model calls."""

    __pydantic_config__: ClassVar[Mapping[str, object]] = STRICT

    scheduler: str  # the name that users type: ddim, euler, ...
    scheduler_class: str  # diffusers' class that it was read off
    steps: int  # as asked for; PNDM has more rows
    eta: float  # DDIM's and TCD's stochasticity, 0 elsewhere
    init_noise_sigma: float
    prediction_type: str
    timestep_spacing: str
    rows: tuple[ScheduleRow, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= len(self.rows):
            raise ValueError(f"{self.steps} steps in {len(self.rows)} rows")
        if not 0 < self.init_noise_sigma < math.inf:
            raise ValueError(f"init_noise_sigma is {self.init_noise_sigma}")
        for index, row in enumerate(self.rows):
            if len(row.outputs) > index + 1:
                raise ValueError(f"row {index} uses {len(row.outputs)} model outputs, only {index + 1} exist by then")

    @property
    def history(self) -> int:
        """How many model outputs have to be kept, the current one included."""
        return max(len(row.outputs) for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """The schedule as it stands in a manifest; floats survive the round trip exactly."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            BundleError: a key is missing, unknown or of a wrong type, a number is not finite, or rows contradict
                each other.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_json(json.dumps(data))
        except ValidationError as problem:
            first = problem.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "schedule"
            raise BundleError(
                f"schedule: {where}: {first['msg']} (found {first['input']!r:.80})", hint="convert the checkpoint again"
            ) from None
