"""A bundle on one machine: every component in every arithmetic that an app may choose there, then a picture."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from ...runtimes.arithmetic import Arithmetic
from ...runtimes.machines.lock import read_lock
from ...runtimes.machines.machine import Machine
from ...runtimes.machines.registry import NATIVE
from ...runtimes.machines.vulkan import NAME as VULKAN
from ...runtimes.machines.vulkan import drivers
from ...runtimes.registry import get_target
from ...stages.artifacts import role_of
from ...stages.errors import ToolCrashed, UsageError
from ...stages.publish import scratch_folder
from ...stages.stage import Runner
from ..gate import coarsest
from ..gates import Drawn, check_oracle
from ..reference.probes import Picture, ProbePlan
from ..reference.scenes import Scene
from ..report import OracleReport, PictureReport
from ..stages import worst_form
from .pictures import DrawOnMachine, PictureOnMachine, drawing_facts
from .report import ArithmeticRow, MachineReport, falls_back
from .stages import ComputedIn, MachineKey, MeasureOnMachine, ProbeArithmetic, probe_factors
from .tolerances import arithmetic_image_tolerance

if TYPE_CHECKING:
    from pathlib import Path

    from ...bundle.bundle import Bundle
    from ...export.compiled_schedule import CompiledSchedule
    from ..reference.probes import Probes, RoundedAnswers
    from ..report import ComponentReport

CALLS = 8
"""UNet calls that are compared on an emulated machine: all of the first picture's, at the demo's size."""

_LOADING: Final = 15.0  # seconds, of a model of SD1.5's size in the emulator
_OF_PROBE: Final = 1.0  # speed of a model beside that of its probe


@dataclass(frozen=True, slots=True)
class OnMachine:
    """A bundle that is checked on a machine, and what it is held against.

    Args:
        rounded: component -> PyTorch's answers with equally rounded weights, for every component but fp32 ones.
        schedule: with which PyTorch drew; None: no pictures.
        calls: UNet and ControlNet calls to compare in each arithmetic.
        work: a folder on the cache's disk.
        say: told how long it will take, where it takes minutes.
        operations: of a call of each component, where a call takes minutes: then the table is brief, one input of one
            form in the arithmetics that decide. Empty: every one.
    """

    bundle: Bundle
    machine: Machine
    probes: Probes
    rounded: Mapping[str, RoundedAnswers]
    schedule: CompiledSchedule | None
    run: Runner
    work: Path
    say: Callable[[str], None]
    calls: int = CALLS
    every_picture: bool = False
    threads: int = 2
    operations: Mapping[str, int] = field(default_factory=dict)

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
        rows = self._rows(choices, there, names, proven)
        rows, recommended, psnr = self._recommend(rows, proven)
        probes = {name: len(self._only(name)) or len(self.probes.labels[name]) for name in proven}
        return MachineReport(
            self.machine.name, target.name, target.version(), tuple(rows), proven, recommended, psnr, probes
        )

    def _rows(
        self,
        choices: Sequence[Arithmetic],
        there: Sequence[Arithmetic],
        names: Sequence[str],
        proven: Mapping[str, str],
    ) -> list[ArithmeticRow]:
        """All of `names`, or of those `there`, and what is proven; of a brief table, as many as decide."""
        brief = bool(self.operations) and not names
        usual = (each.name for each in there if each.is_default or not brief)
        wanted = {*(names or usual), *proven.values()}
        rows = [self._row(each) for each in self._announced([each for each in choices if each.name in wanted])]
        faster = sorted((each for each in there if brief and each.name not in wanted), key=lambda each: each.rank)
        for each in faster:
            if self._fastest(rows, proven) <= each.rank:
                break
            if not falls_back(each.expects, self._probe(each).computed):
                rows += [self._row(each) for each in self._announced([each])]
        return sorted(rows, key=lambda row: choices.index(row.arithmetic))

    def _fastest(self, rows: list[ArithmeticRow], proven: Mapping[str, str]) -> int:
        """Rank of the fastest arithmetic that `rows` recommend."""
        recommended = self._recommend(list(rows), proven)[1].values()
        return min((row.arithmetic.rank for row in rows if row.arithmetic.name in recommended), default=99)

    def _announced(self, arithmetics: list[Arithmetic]) -> list[Arithmetic]:
        """The same; where that is minutes, `say` is told, by the speed that each one's probe was multiplied at."""
        if not self.operations:
            return arithmetics
        minutes = {each.name: self._minutes(self._probe(each).operations_per_second) for each in arithmetics}
        parts = " and ".join(f"{about:.0f} minutes in {name}" for name, about in minutes.items())
        self.say(f"forecast for {self.machine.name}: about {parts}, less what the cache has")
        return arithmetics

    def _minutes(self, speed: float) -> float:
        """For one input of each component; `speed` in operations a second."""
        calls = {name: len(self._only(name)) or len(self.probes.labels[name]) for name in self.operations}
        seconds = sum(_LOADING + self.operations[name] * calls[name] / (speed * _OF_PROBE) for name in calls)
        return max(seconds / 60, 1.0)

    def _row(self, arithmetic: Arithmetic) -> ArithmeticRow:
        manifest = self.bundle.manifest
        models = {name: self.bundle.model(name) for name in self.bundle.components}
        target = manifest.target.name
        components = tuple(self._component(name, arithmetic) for name in models)
        limit = arithmetic_image_tolerance(target, coarsest(models), arithmetic.expects, arithmetic.device)
        return ArithmeticRow(arithmetic, self._probe(arithmetic).computed, components, limit)

    def _probe(self, arithmetic: Arithmetic) -> ComputedIn:
        """In what numbers the machine really computes the denoiser's products, and how fast."""
        model = self.bundle.model(self.bundle.denoiser)
        target = get_target(model.target)
        with scratch_folder(self.work, "probe") as folder:
            _, w = probe_factors()
            probe = target.probe_model(model, w, folder)
            return self.run(ProbeArithmetic(probe, arithmetic.name, self.machine, self._key, self.threads))

    def _component(self, name: str, arithmetic: Arithmetic) -> ComponentReport:
        """The report of the form that is nearest to failing."""
        reports = []
        target = get_target(self.bundle.manifest.target.name)
        why = target.unfit(self.bundle.model(name)).get(arithmetic.name, "")
        forms = () if self.operations else self.bundle.model(name).forms
        for form in ("", *forms):
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
        if role_of(component) not in ("denoiser", "control"):
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
            usable = fits[self.bundle.denoiser] and all(ok[how][part] for part, how in mix.items())
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
