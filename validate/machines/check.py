"""`validate --machine`: the bundle in every arithmetic that an app may choose there, held against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ...export.scheduler import default_scheduler
from ...runtimes.arithmetic import arithmetic_named
from ...runtimes.machines.machine import Machine
from ...runtimes.registry import get_target
from ...stages.cache import Cache
from ...stages.run_stage import run_stage
from ...stages.stage import Runner
from ..check import refuse_prompts
from ..gate import pictures_are_cheap
from ..reference.known_answers import Known, intact_checkpoint, known_answers
from ..reference.operations import CountOperations
from ..reference.probes import oracle_plan
from ..reference.pytorch import ReferenceProbes
from ..reference.scenes import oracle_prompts as oracle_scenes
from .on_machine import CALLS, OnMachine
from .report import MachineReport

if TYPE_CHECKING:
    from pathlib import Path

    from ...bundle.bundle import Bundle
    from ...stages.artifacts import Checkpoint
    from ...stages.progress import Progress
    from ..reference.origin import Origin


def check_on_machines(
    bundle: Bundle,
    machines: Sequence[Machine],
    *,
    reference: Origin | str | None = None,
    image: bool | None = None,
    arithmetics: Sequence[str] = (),
    calls: int | None = None,
    oracle_prompts: int | None = None,
    threads: int = 2,
    cache: Cache | None = None,
    progress: Progress,
) -> list[MachineReport]:
    """Compare every component with PyTorch on each machine, in every arithmetic that an app may choose there.

    Args:
        image: draw a picture in every arithmetic that passes; False: none; None: where pictures are cheap, as many as
            it takes to find the recommendation.
        arithmetics: names of those to try, beside what is proven; none: all of the target.
        calls: UNet calls to compare; None: `CALLS`, or one where a call takes minutes.
        oracle_prompts: captions of the demo to grade in the recommended arithmetic.
    Raises:
        UsageError: the target has no such arithmetic.
        BundleError, CheckpointError: as of `check.check_bundle`.
    """
    cache = cache or Cache.default()
    target = get_target(bundle.manifest.target.name)
    for name in arithmetics:
        arithmetic_named(name, target.arithmetics, target.name)
    checkpoint = intact_checkpoint(bundle, reference, cache)
    if oracle_prompts is not None:
        refuse_prompts(image is not False, checkpoint)
    with cache.used():
        run: Runner = partial(run_stage, cache=cache, progress=progress)
        known = known_answers(bundle, checkpoint, run)
        reports = []
        for machine in machines:
            work = cache.root / "work"
            there = on_machine(
                bundle,
                checkpoint,
                known,
                machine,
                run,
                work,
                image=image,
                calls=calls,
                threads=threads,
                say=progress.say,
            )
            report = there.check(arithmetics)
            if oracle_prompts is not None and report.recommended:
                scenes = oracle_scenes(oracle_prompts, seed=0)
                captions = run(ReferenceProbes(checkpoint, bundle.manifest.size, oracle_plan(scenes)))
                report = replace(report, oracle=there.oracle(report.recommended, captions, scenes))
            reports.append(report)
        return reports


def on_machine(
    bundle: Bundle,
    checkpoint: Checkpoint,
    known: Known,
    machine: Machine,
    run: Runner,
    work: Path,
    *,
    image: bool | None = None,
    calls: int | None = None,
    threads: int = 2,
    say: Callable[[str], None],
) -> OnMachine:
    """What checks `bundle` on `machine`; `image`, `calls`: as of `check_on_machines`; `say`: told a forecast."""
    size = bundle.manifest.size
    cheap = pictures_are_cheap(checkpoint, size)
    counted = (
        {} if cheap else {name: run(CountOperations(source, size)) for name, source in checkpoint.components.items()}
    )
    drawing = cheap if image is None else image
    schedule = bundle.schedule(default_scheduler(checkpoint.scheduler), known.probes.plan.steps) if drawing else None
    return OnMachine(
        bundle,
        machine,
        known.probes,
        known.rounded,
        schedule,
        run,
        work,
        say,
        calls or (CALLS if cheap else 1),
        every_picture=image is True,
        threads=threads,
        operations={name: found.count for name, found in counted.items()},
    )
