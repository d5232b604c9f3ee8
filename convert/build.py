"""One target's models: built as a plan says, raced against float32, proven."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..bundle.manifest_entries import SpeedEntry
from ..quantize.islands import ScanWeights, with_islands
from ..runtimes.inputs import time_embedding_facts
from ..validate.gate import THREADS, ask_pytorch, prove
from ..validate.reference.calibrate import ranged
from ..validate.speed.measure import machine
from ..validate.speed.race import MeasureSpeed, Speed, int8_unit

if TYPE_CHECKING:
    from ..quantize.plan import Plan
    from ..runtimes.protocol import Target
    from ..stages.artifacts import TargetModel
    from ..stages.progress import Progress
    from ..stages.stage import Runner
    from ..validate.reference.probes import Probes
    from ..validate.report import ParityReport
    from .job import Job
    from .recipe import Recipe
    from .shared import Shared


@dataclass(frozen=True, slots=True)
class Built:
    """One target's models, and what was found about them."""

    recipe: Recipe  # with the precision that is in force
    plans: Mapping[str, Plan]
    models: Mapping[str, TargetModel]
    parity: ParityReport | None
    speed: Mapping[str, SpeedEntry] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetBuild:
    """What builds, races and proves the models of one target."""

    job: Job
    shared: Shared
    target: Target
    run: Runner
    progress: Progress

    def built(self) -> Built:
        """The models of the job's plans; with its gates also their parity, and the speed of those with integers."""
        recipe = self.job.recipe
        probes = self.ask() if self.job.request.gate else None
        plans, models = self.models(self.shared.plans, recipe, probes)
        if probes is None:
            return Built(recipe, plans, models, None)
        parity = self.prove(models, plans, probes)
        coded = {part: model for part, model in models.items() if not plans[part].is_float}
        if coded and (why := why_no_gain()):
            self.progress.say(why)
        return Built(recipe, plans, models, parity, entries(self.race(coded, probes)))

    def ask(self) -> Probes:
        """PyTorch's answers."""
        return ask_pytorch(self.job.checkpoint, self.job.pixels, self.run)

    def models(
        self, plans: Mapping[str, Plan], recipe: Recipe, probes: Probes | None
    ) -> tuple[dict[str, Plan], dict[str, TargetModel]]:
        """The models of `plans`, and the plans as this target can hold them."""
        plans, remarks = self.within_float16(plans, probes)
        grouped = self._grouped(plans)
        plans = ranged(grouped, self.job.checkpoint, self.target, self.job.pixels, recipe.rounding, self.run)
        return plans, _noted(self.build(plans), remarks)

    def build(self, plans: Mapping[str, Plan]) -> dict[str, TargetModel]:
        """Component -> its model."""
        sources, pixels = self.job.checkpoint.components, self.job.pixels
        return {part: self.target.build(sources[part], pixels, plan, self.run) for part, plan in plans.items()}

    def _grouped(self, plans: Mapping[str, Plan]) -> dict[str, Plan]:
        """`plans` with groups of weights as the target can hold them."""
        channels = self.target.group_channels
        return {
            part: replace(plan, channels=channels) if any(scheme.group for scheme in plan.schemes) else plan
            for part, plan in plans.items()
        }

    def within_float16(
        self, plans: Mapping[str, Plan], probes: Probes | None
    ) -> tuple[dict[str, Plan], dict[str, tuple[str, ...]]]:
        """`plans` with what does not fit float16 kept in float32, and remarks by component.

        Args:
            probes: their activations are looked at too; None: weights only.
        """
        from ..validate.reference.activation_peaks import ScanActivations

        safe, remarks = dict(plans), {}
        for part, plan in plans.items():
            if not any(scheme.is_half for scheme in plan.schemes):
                continue
            source = self.job.checkpoint.components[part]
            weights = self.run(ScanWeights(source)).read()
            hot = self.run(ScanActivations(source, probes)).read() if probes else {}
            safe[part], remarks[part] = with_islands(
                plan, self.job.parameters[part], weights, hot, mixes=self.target.mixes_floats
            )
            for remark in remarks[part]:
                self.progress.say(f"{self.target.name} {part}: {remark}")
        return safe, remarks

    def race(self, models: Mapping[str, TargetModel], probes: Probes) -> dict[str, dict[str, Speed]]:
        """Component -> form ("" is the default one) -> speed against float32 on the same target."""
        from ..quantize.plan import Plan

        plain = self.build({part: Plan("fp32") for part in models})
        facts = time_embedding_facts(self.job.checkpoint.denoiser.config)
        version, place = self.target.version(), machine()
        speeds: dict[str, dict[str, Speed]] = {}
        for part, model in models.items():
            for form in ("", *(form for form in model.forms if form in plain[part].forms)):
                stage = MeasureSpeed(model, plain[part], probes, facts, version, place, THREADS, form)
                speed = speeds.setdefault(part, {})[form] = self.run(stage)
                if not speed.calm:
                    self.progress.say(
                        f"{self.target.name} {part}{form and f' .{form}'}: other work took the processor in nearly "
                        "every turn of its race with fp32; its ratio is rough"
                    )
        return speeds

    def prove(self, models: Mapping[str, TargetModel], plans: Mapping[str, Plan], probes: Probes) -> ParityReport:
        """Hold `models` against PyTorch."""
        made = self.shared
        return prove(models, plans, self.job.checkpoint, self.target, probes, made.tokenizers, made.schedules, self.run)


def _noted(models: Mapping[str, TargetModel], remarks: Mapping[str, tuple[str, ...]]) -> dict[str, TargetModel]:
    """`models` with `remarks` among their notes, which the bundle keeps."""
    return {
        part: replace(m, notes=(*m.notes, *remarks[part])) if remarks.get(part) else m for part, m in models.items()
    }


def entries(speeds: Mapping[str, Mapping[str, Speed]]) -> dict[str, SpeedEntry]:
    """For the manifest."""
    return {
        part: SpeedEntry(
            ratio_to_fp32=forms[""].ratio, forms={form: speed.ratio for form, speed in forms.items() if form}
        )
        for part, forms in speeds.items()
    }


def why_no_gain() -> str:
    """Why integers cannot be faster on this machine, for people; "" where they may be."""
    unit = int8_unit()
    if unit is None or unit:
        return ""
    return (
        "this processor has no unit for int8 products (VNNI or dot product): integers save size and memory here, "
        "but cannot win time"
    )
