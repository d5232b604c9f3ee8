"""The gate of `convert` as stages: what was proven once about the same models is not proven again.

`validate` on a bundle does not use them: it runs what lies on the disk, every time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from ..export.compiled_schedule import CompiledSchedule
from ..stages.artifacts import TargetModel, sole, with_role
from ..stages.stage import Stage
from .gates import Drawn, check_components, check_pictures, unanswered, undrawn
from .reference.probes import Picture, ProbePlan, Probes, RoundedAnswers, pictures_for
from .report import ComponentReport, ImageReport
from .tolerances import image_tolerance, tolerance


@dataclass(frozen=True, slots=True)
class GatedComponent:
    """A component's report."""

    folder: Path
    report: ComponentReport
    digest: str = ""


@dataclass(frozen=True)
class GateComponent(Stage[GatedComponent]):
    """Run a model over its probes in this (child) process."""

    model: TargetModel
    probes: Probes
    rounded: RoundedAnswers | None
    time_embedding: Mapping[str, Any]
    runtime_version: str
    threads: int = 2
    form: str = ""  # another form of the model than the one that is loaded by default

    name: ClassVar[str] = "gate"
    version: ClassVar[int] = 1
    tools: ClassVar[tuple[str, ...]] = ("numpy",)
    output: ClassVar[type] = GatedComponent

    @property
    def runtime(self) -> str:
        return self.model.target

    def key(self) -> Mapping[str, object]:
        model = self.model
        limits = [tolerance("loss", model.component, model.target, model.precision)]
        if self.rounded:
            limits.append(tolerance("fidelity", model.component, model.target, model.precision))
        return {
            "model": model.digest,
            "form": self.form,
            "time_embedding": dict(self.time_embedding),
            "runtime": self.runtime_version,
            "probes": self.probes.digest,
            "rounded": self.rounded.digest if self.rounded else None,
            "tolerances": [asdict(limit) for limit in limits],
            "threads": self.threads,
        }

    def run(self, into: Path) -> GatedComponent:
        from ..runtimes.registry import get_target

        model = in_form(self.model, self.form)
        (report,) = check_components(
            lambda _: get_target(model.target).open(model, threads=self.threads),
            self.probes,
            target=model.target,
            precisions={model.component: model.precision},
            time_embedding=self.time_embedding,
            rounded={model.component: self.rounded} if self.rounded else None,
            crashes="raise",
        )
        return GatedComponent(into, replace(report, form=self.form))

    def crashed(self, what: str) -> ComponentReport:
        """The report for a run that died of `what`; nobody keeps it."""
        model = self.model
        return replace(unanswered(model.component, model.precision, model.target, what), form=self.form)


def in_form(model: TargetModel, form: str) -> TargetModel:
    """`model` with the files of one of its forms; "" is the one that is loaded by default."""
    return replace(model, files=model.forms[form]) if form else model


def worst_form(reports: Iterable[ComponentReport]) -> ComponentReport:
    """The report with the smallest margin, among those of a component's forms."""
    return min(reports, key=lambda report: report.margin_db)


@dataclass(frozen=True, slots=True)
class GatedPictures:
    """The pictures' report."""

    folder: Path
    report: ImageReport
    digest: str = ""


@dataclass(frozen=True)
class GatePictures(Stage[GatedPictures]):
    """Draw the plan's pictures with a target's models alone and compare them with PyTorch's."""

    models: Mapping[str, TargetModel]
    probes: Probes
    precision: str  # the coarsest of the models'
    tokenizer: Path  # folder with tokenizer.json
    tokenizer_digest: str
    tokenizer_facts: Mapping[str, int]  # max_tokens, pad_id
    schedule: CompiledSchedule
    vae: Mapping[str, float]  # scaling_factor, shift, and the encoder's
    time_embedding: Mapping[str, Any]
    runtime_version: str
    threads: int = 2
    tokenizer_2: Path | None = None  # of the second text encoder
    tokenizer_2_digest: str = ""
    tokenizer_2_facts: Mapping[str, int] = field(default_factory=dict)
    zeros_for_empty: bool = False  # an empty negative prompt stands for zeros
    input_channels: int = 4  # of the UNet

    name: ClassVar[str] = "pictures"
    version: ClassVar[int] = 3
    tools: ClassVar[tuple[str, ...]] = ("numpy", "tokenizers")
    output: ClassVar[type] = GatedPictures

    @property
    def runtime(self) -> str:
        return next(iter(self.models.values())).target

    def key(self) -> Mapping[str, object]:
        return {
            "models": {name: model.digest for name, model in self.models.items()},
            "runtime": self.runtime_version,
            "probes": self.probes.digest,
            "tokenizer": [self.tokenizer_digest, dict(self.tokenizer_facts)],
            "tokenizer_2": [self.tokenizer_2_digest, dict(self.tokenizer_2_facts)],
            "zeros_for_empty": self.zeros_for_empty,
            "input_channels": self.input_channels,
            "time_embedding": dict(self.time_embedding),
            "schedule": self.schedule.to_json(),
            "vae": dict(self.vae),
            "tolerance": asdict(image_tolerance(self.runtime, self.precision)),
            "threads": self.threads,
        }

    def run(self, into: Path) -> GatedPictures:
        from ..runtimes.registry import get_target
        from ..runtimes.txt2img.generate import TextToImage, draw
        from ..runtimes.txt2img.tokenizer import PromptTokenizer

        painter = TextToImage(
            tokenizer=PromptTokenizer(self.tokenizer, **self.tokenizer_facts),
            open=lambda name: get_target(self.runtime).open(self.models[name], threads=self.threads),
            schedules=(self.schedule,),
            guidance_mode=self.probes.plan.guidance_mode,
            default_guidance=self.probes.plan.guidance,
            scaling_factor=self.vae["scaling_factor"],
            shift=self.vae["shift"],
            encoder_scaling=(self.vae["encoder_scaling_factor"], self.vae["encoder_shift"]),
            size=self.probes.size,
            time_embedding=self.time_embedding,
            tokenizer_2=PromptTokenizer(self.tokenizer_2, **self.tokenizer_2_facts) if self.tokenizer_2 else None,
            zeros_for_empty=self.zeros_for_empty,
            input_channels=self.input_channels,
            controlled=bool(with_role("control", self.models)),
            denoiser=sole("denoiser", self.models),
        )
        pictures = pictures_for(painter)

        def drawn(picture: Picture, plan: ProbePlan) -> Drawn:
            how: dict[str, Any] = {"guidance": plan.guidance, "seed": picture.seed, **pictures}
            result = draw(painter, picture.prompt, keep_trajectory=True, **how)
            return Drawn(result.trajectory, result.image)

        limit = image_tolerance(self.runtime, self.precision)
        return GatedPictures(into, check_pictures(drawn, self.probes, limit=limit, crashes="raise"))

    def crashed(self, what: str) -> ImageReport:
        """The report for a run that died of `what`; nobody keeps it."""
        return undrawn(self.probes.plan, image_tolerance(self.runtime, self.precision), what)
