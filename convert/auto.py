"""Speed honesty: every model of fewer bits is raced against float32, and `auto` takes none that loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from ..bundle.manifest_entries import SpeedEntry
from ..quantize.islands import ScanWeights, with_islands
from ..runtimes.inputs import time_embedding_facts
from ..stages.errors import UsageError
from ..validate.gate import THREADS, ask_pytorch, prove
from ..validate.reference.calibrate import calibrated, ranged
from ..validate.speed.measure import machine
from ..validate.speed.race import SLOWER, MeasureSpeed, Speed, int8_unit, whole_ratio
from ..validate.tolerances import AUTO_IMAGE_DB, image_tolerance

if TYPE_CHECKING:
    from ..export.accessories import Schedules, Tokenizer
    from ..quantize.plan import Plan, Shapes
    from ..runtimes.protocol import Target
    from ..stages.artifacts import Checkpoint, TargetModel
    from ..stages.progress import Progress
    from ..stages.stage import Runner
    from ..validate.reference.probes import Probes
    from ..validate.report import ParityReport
    from .recipe import Recipe

PICTURE: Final = {"text_encoder": 2, "text_encoder_2": 2, "unet": 40, "controlnet": 40, "vae_decoder": 1}
"""Calls of one picture: 20 steps, two branches of guidance."""


@dataclass(frozen=True, slots=True)
class Built:
    """One target's models, and what was found about them."""

    recipe: Recipe  # with the precision that is in force
    plans: Mapping[str, Plan]
    models: Mapping[str, TargetModel]
    parity: ParityReport | None
    speed: Mapping[str, SpeedEntry] = field(default_factory=dict)


@dataclass(frozen=True)
class OneTarget:
    """The models of one target: built, raced against float32, proven."""

    source: Checkpoint
    runtime: Target
    size: tuple[int, int]  # height, width in pixels
    tokenizers: tuple[Tokenizer, ...]
    schedules: Schedules
    run: Runner
    progress: Progress

    def build(self, plans: Mapping[str, Plan]) -> dict[str, TargetModel]:
        """Component -> its model."""
        return {
            part: self.runtime.build(self.source.components[part], self.size, plan, self.run)
            for part, plan in plans.items()
        }

    def grouped(self, plans: Mapping[str, Plan]) -> dict[str, Plan]:
        """`plans` with groups of weights as the target can hold them."""
        channels = self.runtime.group_channels
        return {
            part: replace(plan, channels=channels) if any(scheme.group for scheme in plan.schemes) else plan
            for part, plan in plans.items()
        }

    def within_float16(
        self, plans: Mapping[str, Plan], parameters: Mapping[str, Shapes], probes: Probes | None
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
            source = self.source.components[part]
            weights = self.run(ScanWeights(source)).read()
            hot = self.run(ScanActivations(source, probes)).read() if probes else {}
            safe[part], remarks[part] = with_islands(
                plan, parameters[part], weights, hot, mixes=self.runtime.mixes_floats
            )
            for remark in remarks[part]:
                self.progress.say(f"{self.runtime.name} {part}: {remark}")
        return safe, remarks

    def built(
        self, recipe: Recipe, plans: Mapping[str, Plan], parameters: Mapping[str, Shapes], *, gate: bool
    ) -> Built:
        """The models of `plans`; with `gate` also their parity, and the speed of those with integers."""
        probes = ask_pytorch(self.source, self.size, self.run) if gate else None
        plans, remarks = self.within_float16(plans, parameters, probes)
        plans = ranged(self.grouped(plans), self.source, self.runtime, self.size, recipe.rounding, self.run)
        models = _noted(self.build(plans), remarks)
        if probes is None:
            return Built(recipe, plans, models, None)
        parity = self._prove(models, plans, probes)
        coded = {part: model for part, model in models.items() if not plans[part].is_float}
        if coded and (why := why_no_gain()):
            self.progress.say(why)
        return Built(recipe, plans, models, parity, entries(self.race(coded, probes)))

    def choose(self, recipe: Recipe, parameters: Mapping[str, Shapes]) -> Built:
        """The smallest candidate that is not slower than float32 here and passes its gates; float32 is the last."""
        probes = ask_pytorch(self.source, self.size, self.run)
        if why := why_no_gain():
            self.progress.say(why)
        tried = candidates(self.runtime, recipe, parameters)
        for number, (settled, plans) in enumerate(tried, start=1):
            label, last = f"{self.runtime.name} {settled.quantize.precision}", number == len(tried)
            plans = calibrated(plans, self.source, self.size, settled.rounding, self.run)
            plans, remarks = self.within_float16(plans, parameters, probes)
            plans = ranged(self.grouped(plans), self.source, self.runtime, self.size, settled.rounding, self.run)
            models = _noted(self.build(plans), remarks)
            speeds = self.race({part: model for part, model in models.items() if model.precision != "fp32"}, probes)
            default = {part: forms[""] for part, forms in speeds.items()}
            ratio = whole_ratio(default, PICTURE) if speeds else 1.0
            if speeds and whole_ratio(default, PICTURE, least=True) > SLOWER and not last:
                self.progress.say(f"auto: {label} is slower than fp32 here: a picture takes {ratio:.2f}x of its time")
                continue
            parity = self._prove(models, plans, probes)
            if not parity.ok and not last:
                self.progress.say(f"auto: {label} does not pass its gates: {parity.failures()[0]}")
                continue
            if parity.image and parity.image.psnr_db < AUTO_IMAGE_DB and not last:
                found = f"{parity.image.psnr_db:.1f} dB in the worst picture, {AUTO_IMAGE_DB:g} are asked for"
                self.progress.say(f"auto: {label} passes its gates, but may be seen: {found}")
                continue
            alike = ", which is no more than two loads of one model differ by" if 1 < ratio <= SLOWER else ""
            self.progress.say(f"auto: {label} it is; a picture takes {ratio:.2f}x of fp32's time here{alike}")
            return Built(settled, plans, models, parity, entries(speeds))
        raise AssertionError("float32 is always a candidate")

    def race(self, models: Mapping[str, TargetModel], probes: Probes) -> dict[str, dict[str, Speed]]:
        """Component -> form ("" is the default one) -> speed against float32 on the same target."""
        from ..quantize.plan import Plan

        plain = self.build({part: Plan("fp32") for part in models})
        facts = time_embedding_facts(self.source.components["unet"].config)
        version, place = self.runtime.version(), machine()
        found: dict[str, dict[str, Speed]] = {}
        for part, model in models.items():
            for form in ("", *(form for form in model.forms if form in plain[part].forms)):
                stage = MeasureSpeed(model, plain[part], probes, facts, version, place, THREADS, form)
                speed = found.setdefault(part, {})[form] = self.run(stage)
                if not speed.calm:
                    self.progress.say(
                        f"{self.runtime.name} {part}{form and f' .{form}'}: other work took the processor in nearly "
                        "every turn of its race with fp32; its ratio is rough"
                    )
        return found

    def _prove(self, models: Mapping[str, TargetModel], plans: Mapping[str, Plan], probes: Probes) -> ParityReport:
        return prove(models, plans, self.source, self.runtime, probes, self.tokenizers, self.schedules, self.run)


def _noted(models: Mapping[str, TargetModel], remarks: Mapping[str, tuple[str, ...]]) -> dict[str, TargetModel]:
    """`models` with `remarks` among their notes, which the bundle keeps."""
    return {
        part: replace(m, notes=(*m.notes, *remarks[part])) if remarks.get(part) else m for part, m in models.items()
    }


def candidates(
    target: Target, recipe: Recipe, parameters: Mapping[str, Shapes]
) -> list[tuple[Recipe, dict[str, Plan]]]:
    """What `auto` tries on `target`, smallest first: the schemes whose pictures are held to `AUTO_IMAGE_DB`."""
    from ..quantize.scheme import parse_scheme

    found = []
    for precision in target.precisions:
        if parse_scheme(precision).computes_half:
            continue  # a race is run here, and this pays on other processors
        try:
            if image_tolerance(target.name, precision).min_psnr_db < AUTO_IMAGE_DB:
                continue
        except UsageError:  # no tolerance is written down: nothing could prove it
            continue
        settled = recipe.settled(precision)
        plans = settled.plans(parameters)
        found.append((sum(plan.bits(parameters[name]) for name, plan in plans.items()), settled, plans))
    return [(settled, plans) for _, settled, plans in sorted(found, key=lambda each: each[0])]


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
