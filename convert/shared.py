"""What all targets of a job have in common, made once: tokenizers, schedules, and samples to round by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..checkpoints.families import reference_pipeline
from ..export.accessories import CompileSchedules, WriteTokenizer
from ..stages.artifacts import Checkpoint
from ..stages.errors import CheckpointError
from ..stages.progress import Progress
from ..stages.stage import Runner
from ..validate.reference.calibrate import calibrated
from ..validate.reference.probes import plan_for

if TYPE_CHECKING:
    from ..export.accessories import Schedules, Tokenizer
    from ..quantize.plan import Plan
    from .job import Job


@dataclass(frozen=True, slots=True)
class Shared:
    """What every bundle of a job is made with.

    Args:
        tokenizers: of the first text encoder, and of the second if there is one.
        plans: the job's, with the samples that their rounding needs.
        moved: by adapters: component -> weight -> how far, as a share of it.
    """

    tokenizers: tuple[Tokenizer, ...]
    schedules: Schedules
    plans: Mapping[str, Plan]
    moved: Mapping[str, Mapping[str, float]]


def share(job: Job, run: Runner, progress: Progress) -> Shared:
    """Make it, and say what a user should know of it."""
    for remark in job.checkpoint.remarks:
        progress.say(remark)
    tokenizers = _tokenizers(job.checkpoint, run)
    schedules = _schedules(job, run)
    plans = calibrated(job.plans, job.checkpoint, job.pixels, job.recipe.rounding, run)
    for remark in schedules.remarks():
        progress.say(remark)
    return Shared(tokenizers, schedules, plans, _movements(job.checkpoint, run, progress))


def _tokenizers(checkpoint: Checkpoint, run: Runner) -> tuple[Tokenizer, ...]:
    if "text_encoder_2" in checkpoint.components and checkpoint.tokenizer_2 is None:
        raise CheckpointError(
            f"{checkpoint.root}: the second text encoder has no tokenizer", hint="convert it from a diffusers folder"
        )
    tokenizers = []
    for folder, prefix in ((checkpoint.tokenizer, "tokenizer/"), (checkpoint.tokenizer_2, "tokenizer_2/")):
        if folder is not None:
            files = {f.removeprefix(prefix): h for f, h in checkpoint.sources.items() if f.startswith(prefix)}
            tokenizers.append(run(WriteTokenizer(folder, files, checkpoint.words)))
    return tuple(tokenizers)


def _schedules(job: Job, run: Runner) -> Schedules:
    # the gate draws its pictures with the checkpoint's own scheduler, whatever the recipe's default is
    checkpoint, choice = job.checkpoint, job.recipe.schedule
    wanted = [(choice.default, job.sampling.steps), ("checkpoint", plan_for(checkpoint, job.pixels).steps)]
    wanted += [(other.name, steps) for other in choice.also for steps in other.steps]
    return run(
        CompileSchedules(
            checkpoint.scheduler, tuple(dict.fromkeys(wanted)), reference_pipeline(checkpoint), choice.timesteps
        )
    )


def _movements(checkpoint: Checkpoint, run: Runner, progress: Progress) -> dict[str, dict[str, float]]:
    """How far adapters move each weight, by component; said in a line each."""
    from ..checkpoints.adapters.movement import MeasureMovement

    moved = {}
    for name, part in checkpoint.components.items():
        if any(change.kind != "rows" for change in part.adapted):
            movement = run(MeasureMovement(part))
            progress.say(movement.summary())
            moved[name] = movement.read()
    return moved
