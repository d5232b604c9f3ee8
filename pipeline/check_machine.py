"""`validate --machine`: the bundle in every arithmetic that an app may choose there, held against PyTorch."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ..export.scheduler import default_scheduler
from ..runtimes.arithmetic import Arithmetic, arithmetic_named
from ..runtimes.machines.lock import read_lock
from ..runtimes.machines.machine import Machine
from ..runtimes.machines.registry import NATIVE
from ..runtimes.machines.vulkan import NAME as VULKAN
from ..runtimes.machines.vulkan import drivers
from ..runtimes.registry import get_target
from ..validate.arithmetic_tolerances import arithmetic_image_tolerance
from ..validate.gates import Drawn, check_oracle
from ..validate.machine_report import ArithmeticRow, MachineReport
from ..validate.machine_stages import MachineKey, MeasureOnMachine, ProbeArithmetic, probe_factors
from ..validate.probes import Picture, ProbePlan, oracle_plan
from ..validate.reference import ReferenceProbes
from ..validate.report import OracleReport, PictureReport
from ..validate.scenes import Scene
from ..validate.scenes import oracle_prompts as oracle_scenes
from ..validate.stages import worst_form
from .cache import Cache
from .check import refuse_prompts
from .errors import ToolCrashed, UsageError
from .gate import coarsest, pictures_are_cheap
from .known_answers import Known, intact_checkpoint, known_answers
from .machine_pictures import DrawOnMachine, PictureOnMachine, drawing_facts
from .publish import scratch_folder
from .stage import Runner, run_stage

if TYPE_CHECKING:
    from pathlib import Path

    from ..runtimes.arithmetic import Computed
    from ..validate.probes import Probes, RoundedAnswers
    from ..validate.report import ComponentReport
    from .artifacts import Checkpoint
    from .bundle import Bundle
    from .origin import Origin
    from .progress import Progress
    from .schedule import CompiledSchedule

CALLS = 8
"""UNet calls that are compared on an emulated machine: all of the first picture's, at the demo's size."""


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
            there = on_machine(bundle, checkpoint, known, machine, run, work, image=image, calls=calls, threads=threads)
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
) -> OnMachine:
    """What checks `bundle` on `machine`; `image`, `calls`: as of `check_on_machines`."""
    cheap = pictures_are_cheap(checkpoint, bundle.manifest.size)
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
        calls or (CALLS if cheap else 1),
        every_picture=image is True,
        threads=threads,
    )


@dataclass(frozen=True, slots=True)
class OnMachine:
    """A bundle that is checked on a machine, and what it is held against.

    Args:
        rounded: component -> PyTorch's answers with equally rounded weights, for every component but fp32 ones.
        schedule: with which PyTorch drew; None: no pictures.
        calls: UNet and ControlNet calls to compare in each arithmetic.
        work: a folder on the cache's disk.
    """

    bundle: Bundle
    machine: Machine
    probes: Probes
    rounded: Mapping[str, RoundedAnswers]
    schedule: CompiledSchedule | None
    run: Runner
    work: Path
    calls: int = CALLS
    every_picture: bool = False
    threads: int = 2

    def check(self, names: Sequence[str] = ()) -> MachineReport:
        """Every arithmetic of the target, or those of `names` and what is proven, and what to recommend."""
        target = get_target(self.bundle.manifest.target.name)
        models = {name: self.bundle.model(name) for name in self.bundle.components}
        proven = {name: target.proven_in(model) for name, model in models.items()}
        choices = target.choices(models.values())
        there = [each for each in choices if each.device == self.machine.device]
        if not there:
            raise UsageError(
                f"target {target.name!r} does not run on {self.machine.name}", hint="its package has no such backend"
            )
        wanted = {*(names or [each.name for each in there]), *proven.values()}
        rows = [self._row(each) for each in choices if each.name in wanted]
        rows, recommended, psnr = self._recommend(rows, proven)
        probes = {name: len(self._only(name)) or len(self.probes.labels[name]) for name in proven}
        return MachineReport(
            self.machine.name, target.name, target.version(), tuple(rows), proven, recommended, psnr, probes
        )

    def _row(self, arithmetic: Arithmetic) -> ArithmeticRow:
        manifest = self.bundle.manifest
        models = {name: self.bundle.model(name) for name in self.bundle.components}
        target = manifest.target.name
        components = tuple(self._component(name, arithmetic) for name in models)
        limit = arithmetic_image_tolerance(target, coarsest(models), arithmetic.expects, arithmetic.device)
        return ArithmeticRow(arithmetic, self._computed(arithmetic), components, limit)

    def _computed(self, arithmetic: Arithmetic) -> Computed:
        """In what numbers the machine really computes the denoiser's products."""
        model = self.bundle.model("unet")
        target = get_target(model.target)
        with scratch_folder(self.work, "probe") as folder:
            _, w = probe_factors()
            probe = target.probe_model(model, w, folder)
            return self.run(ProbeArithmetic(probe, arithmetic.name, self.machine, self._key, self.threads)).computed

    def _component(self, name: str, arithmetic: Arithmetic) -> ComponentReport:
        """The report of the form that is nearest to failing."""
        reports = []
        target = get_target(self.bundle.manifest.target.name)
        why = target.unfit(self.bundle.model(name)).get(arithmetic.name, "")
        for form in ("", *self.bundle.model(name).forms):
            stage = MeasureOnMachine(
                self.bundle.model(name, form or None),
                form,
                arithmetic,
                self.machine,
                self._key,
                self.probes,
                self.rounded.get(name),
                self.bundle.manifest.time_embedding.model_dump(),
                self._only(name),
                self.threads,
            )
            if why:  # it would read other memory, and by chance be right
                reports.append(stage.unanswered(f"not run: {why}"))
                continue
            try:
                reports.append(self.run(stage).report)
            except ToolCrashed as crash:  # of this moment, perhaps: not kept
                reports.append(stage.unanswered(crash.what))
        return worst_form(reports)

    def _only(self, component: str) -> tuple[int, ...]:
        """Which of PyTorch's answers are compared; none named: all."""
        if component not in ("unet", "controlnet"):
            return () if self.calls > 1 else (0,)  # where a UNet call takes minutes, so does the rest
        return tuple(range(min(self.calls, len(self.probes.labels[component]))))

    def _recommend(
        self, rows: list[ArithmeticRow], proven: Mapping[str, str]
    ) -> tuple[list[ArithmeticRow], dict[str, str], float | None]:
        """The fastest arithmetic whose picture passes; components that fail in it stay in the one that is proven."""
        ok = {row.arithmetic.name: {part.component: part.ok for part in row.components} for row in rows}
        recommended: dict[str, str] = {}
        psnr: float | None = None
        for row in sorted(rows, key=lambda row: row.arithmetic.rank):
            name = row.arithmetic.name
            fits = ok[name]
            mix = {part: name if fits[part] else proven[part] for part in fits}
            usable = fits["unet"] and all(ok[how][part] for part, how in mix.items())
            # what falls back is another row's arithmetic, unless it is how the bundle was proven
            own = not row.falls_back or name in proven.values()
            if not usable or not own or (recommended and not self.every_picture):
                continue
            if self.schedule is None:
                recommended = recommended or mix
                continue
            drawn, problem = self._picture(mix)
            if set(mix.values()) == {name}:
                rows[rows.index(row)] = row = replace(row, picture=drawn, picture_problem=problem)
            good = drawn is not None and drawn.image.psnr_db >= row.image_tolerance.min_psnr_db
            if good and not recommended:
                recommended, psnr = mix, drawn.image.psnr_db if drawn else None
        return rows, recommended, psnr

    def _picture(self, arithmetics: Mapping[str, str]) -> tuple[PictureReport | None, str]:
        try:
            return self._drawn(arithmetics, self.probes, 0).report, ""
        except ToolCrashed as crash:
            return None, crash.what

    def _drawn(self, arithmetics: Mapping[str, str], probes: Probes, index: int) -> PictureOnMachine:
        assert self.schedule is not None
        facts = drawing_facts(self.bundle.manifest)
        return self.run(
            DrawOnMachine(
                self.bundle.path,
                facts,
                self.schedule,
                arithmetics,
                self.machine,
                self._key,
                probes,
                index,
                self.threads,
            )
        )

    def oracle(self, arithmetics: Mapping[str, str], captions: Probes, scenes: Sequence[Scene]) -> OracleReport:
        """Grade pictures of `scenes` that the machine draws; each is kept, so that a run that is stopped goes on.

        Args:
            arithmetics: component -> name.
            captions: PyTorch's pictures of the scenes.
        """

        def draw(picture: Picture, plan: ProbePlan) -> Drawn:
            return Drawn((), self._drawn(arithmetics, captions, picture.seed - plan.seed).image())

        models = {name: self.bundle.model(name) for name in self.bundle.components}
        return check_oracle(draw, captions, scenes, coarsest(models))

    @property
    def _key(self) -> MachineKey:
        parts = read_lock().digest
        if self.machine.name in (NATIVE, VULKAN):
            parts = f"{platform.machine()} {platform.processor()} {' '.join(drivers())}"
        return MachineKey(self.machine.name, parts, get_target(self.bundle.manifest.target.name).version())
