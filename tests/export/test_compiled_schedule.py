"""A schedule survives JSON exactly, and damaged ones are refused with the place."""

from __future__ import annotations

import json
import math
from typing import Any, Final

import numpy as np
import pytest
from diffusette.export.compiled_schedule import CompiledSchedule, ScheduleRow
from diffusette.stages.errors import BundleError

ROW: Final = ScheduleRow(
    timestep=999.0, input_scale=0.1, latent=1 / 3, outputs=(-0.7,), noise=0.0, signal=0.068, noise_level=0.997
)
SCHEDULE: Final = CompiledSchedule(
    scheduler="ddim",
    scheduler_class="DDIMScheduler",
    steps=2,
    eta=0.0,
    init_noise_sigma=14.6,
    prediction_type="epsilon",
    timestep_spacing="leading",
    rows=(ROW, ScheduleRow(499.0, 1.0, 1.1, (-0.5, math.pi), 0.25, 0.6, 0.8)),
)


def test_json_gives_back_the_same_schedule() -> None:
    assert CompiledSchedule.from_json(json.loads(json.dumps(SCHEDULE.to_json()))) == SCHEDULE


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("steps",), 0),
        (("steps",), "2"),
        (("steps",), 3),
        (("init_noise_sigma",), -1.0),
        (("extra",), 1),
        (("rows",), []),
        (("rows", 0, "timestep"), None),
        (("rows", 0, "latent"), math.nan),
        (("rows", 1, "latent"), math.inf),
        (("rows", 1, "latent"), "1.0"),
        (("rows", 0, "outputs"), []),
        (("rows", 0, "outputs"), [1.0, 2.0]),
        (("rows", 0, "surprise"), 1.0),
    ],
)
def test_a_damaged_schedule_is_refused(path: tuple[Any, ...], value: object) -> None:
    plain: Any = SCHEDULE.to_json()
    place = plain
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(BundleError, match="schedule"):
        CompiledSchedule.from_json(plain)


def test_a_missing_key_is_named() -> None:
    plain = SCHEDULE.to_json()
    del plain["rows"][1]["noise"]
    with pytest.raises(BundleError, match=r"rows\.1\.noise"):
        CompiledSchedule.from_json(plain)


def test_a_step_is_the_weighted_sum_in_float32() -> None:
    x, newest, older, noise = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float32)
    row = SCHEDULE.rows[1]
    stepped = row.step(x, [newest, older], noise)
    assert stepped.dtype == np.float32
    np.testing.assert_allclose(stepped, 1.1 * x - 0.5 * newest + math.pi * older + 0.25 * noise, rtol=1e-5, atol=1e-6)


def test_a_step_refuses_noise_that_it_does_not_use_and_misses_noise_that_it_does() -> None:
    x = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="given"):
        ROW.step(x, [x], x)
    with pytest.raises(ValueError, match="absent"):
        SCHEDULE.rows[1].step(x, [x, x])
