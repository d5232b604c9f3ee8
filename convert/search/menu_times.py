"""What the mixtures of a menu take in time: the UNet of each, built for the target and run on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...stages.stage import Runner
from .goal import Found

if TYPE_CHECKING:
    from ...quantize.rounding import Rounding
    from ...runtimes.protocol import Target
    from ...stages.artifacts import Checkpoint


def with_times(
    found: Found, source: Checkpoint, size: tuple[int, int], rounding: Rounding, runtimes: Sequence[Target], run: Runner
) -> Found:
    """`found` with milliseconds of a UNet call, for the rows whose weights are rounded already.

    A picture is 40 such calls of 20 steps, and little else. Rows of a large model, whose UNet would take minutes to
    round and to build for each, keep none.
    """
    from ...runtimes.inputs import time_embedding_facts
    from ...validate.gate import THREADS
    from ...validate.reference.calibration import calibration_plans
    from ...validate.reference.pytorch import ReferenceProbes
    from ...validate.speed.measure import machine
    from ...validate.speed.times import MeasureTimes

    if not any(row.plans for row in found.menu):
        return found
    probes = run(ReferenceProbes(source, size, calibration_plans(source, size, rounding.prompts)[0]))
    unet = source.denoiser
    facts = time_embedding_facts(unet.config)
    times: list[dict[str, float]] = [{} for _ in found.menu]
    for runtime in runtimes:
        models = tuple(runtime.build(unet, size, row.plans[unet.component], run) for row in found.menu)
        timed = run(MeasureTimes(models, probes, facts, runtime.version(), machine(), THREADS))
        for ms, value in zip(times, timed.ms, strict=True):
            ms[runtime.name] = value
    return replace(found, menu=tuple(replace(row, unet_ms=ms) for row, ms in zip(found.menu, times, strict=True)))
