"""`validate`: run what lies in a bundle, every time, and hold it against PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..bundle.bundle import Bundle
from ..bundle.sessions import opener, painter
from ..runtimes.txt2img.generate import draw
from ..stages.cache import Cache
from ..stages.errors import UsageError
from ..stages.progress import Progress, Silent
from ..stages.run_stage import run_stage
from .gate import ask_pytorch, beside_rounding, coarsest, pictures_are_cheap
from .gates import Drawn, check_components, check_oracle, check_pictures, kept_open
from .layers.report import ComponentLayers
from .reference.known_answers import intact_checkpoint, known_answers
from .reference.origin import Origin
from .reference.probes import Picture, ProbePlan, Probes, RoundedAnswers, oracle_plan, pictures_for, plan_for
from .report import ComponentReport, ParityReport
from .stages import worst_form
from .timesteps.of_bundle import timesteps_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..quantize.plan import Plan
    from ..stages.artifacts import Checkpoint, TargetModel
    from ..stages.stage import Runner
    from .timesteps.curve import TimestepCurve


@dataclass(frozen=True, slots=True)
class PictureChoice:
    """Which pictures to compare. `scheduler` and `steps` are of those that the bundle carries; None: the gate's."""

    seeds: int = 1  # of each prompt
    scheduler: str | None = None
    steps: int | None = None


def check_bundle(
    bundle: Bundle,
    *,
    reference: Origin | str | None = None,
    image: bool | None = None,
    oracle_prompts: int | None = None,
    choice: PictureChoice | None = None,
    keep: Callable[[Picture, Drawn], None] = lambda _, __: None,
    layers: bool = False,
    timesteps: bool | None = None,
    threads: int = 2,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> tuple[ParityReport, list[str]]:
    """Compare every component, and pictures where asked for or cheap; return the report and remarks for people.

    Args:
        reference: the checkpoint, with what was given beside it; None: where this machine converted it.
        choice: other pictures than the gate's.
        timesteps: with pictures, also measure the UNet's error timestep by timestep; None: where `image` asks for them.
        keep: is handed PyTorch's and the bundle's version of each picture, for those who want to show them.
    Raises:
        BundleError: a file differs from the manifest.
        CheckpointError: there is no reference to compare with.
        UsageError: the bundle has no such schedule, or pictures are chosen but not wanted.
    """
    cache, progress = cache or Cache.default(), progress or Silent()
    checkpoint = intact_checkpoint(bundle, reference, cache)
    cheap = pictures_are_cheap(checkpoint, bundle.manifest.size)
    pictures = cheap if image is None else image
    if oracle_prompts is not None:
        refuse_prompts(pictures, checkpoint)
    plan = _picture_plan(bundle, checkpoint, choice, pictures) if choice else None
    with cache.used():  # nobody may prune PyTorch's answers meanwhile
        run: Runner = partial(run_stage, cache=cache, progress=progress)
        facts = bundle.manifest
        models = {name: bundle.model(name) for name in bundle.components}
        known = known_answers(bundle, checkpoint, run)
        probes, plans, rounded = known.probes, known.plans, known.rounded
        remarks: list[str] = []
        with progress.running(f"{facts.target.name} components"):
            components = _check_forms(bundle, models, probes, rounded, threads)
        report = ParityReport(facts.target.name, components)
        if layers:
            found = _look_into(bundle, checkpoint, plans, report, probes, threads, cache, progress)
            report = replace(report, layers=found)
        if image is None and not cheap:
            remarks.append(
                "no pictures were drawn, because that takes long for a model of this size: ask for them with --image"
            )
        if not pictures:
            return report, remarks
        if not all(part.ok for part in components) and not image:
            remarks.append("no pictures were drawn, because a component failed: force them with --image")
            return report, remarks
        curved = image is True if timesteps is None else timesteps
        curve_of = partial(timesteps_of, bundle, checkpoint, plans, gate_probes=probes) if curved else None
        return _with_pictures(
            report,
            bundle,
            checkpoint,
            plans,
            coarsest(models),
            threads,
            plan,
            keep,
            curve_of,
            oracle_prompts,
            run,
            progress,
        ), remarks


def layers_of(
    bundles: Sequence[Bundle], *, reference: Origin | None, threads: int, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Layers of each bundle as `validate --layers --json` says them, by runtime, or by folder where two have one."""
    targets = [bundle.manifest.target.name for bundle in bundles]
    found = {}
    for bundle, target in zip(bundles, targets, strict=True):
        report, _ = check_bundle(
            bundle, reference=reference, image=False, layers=True, threads=threads, progress=progress
        )
        label = target if targets.count(target) == 1 else str(bundle.path)
        found[label] = list(report.to_json()["layers"])
    return found


def _look_into(
    bundle: Bundle,
    checkpoint: Checkpoint,
    plans: Mapping[str, Plan],
    report: ParityReport,
    probes: Probes,
    threads: int,
    cache: Cache,
    progress: Progress,
) -> tuple[ComponentLayers, ...]:
    """Every component, module by module, the worst component first."""
    from .layers.of_bundle import look_into

    return tuple(
        look_into(
            bundle.model(part.component),
            checkpoint.components[part.component],
            plans[part.component],
            part,
            probes,
            time_embedding=bundle.manifest.time_embedding.model_dump(),
            threads=threads,
            cache=cache,
            progress=progress,
        )
        for part in report.components
    )


def _check_forms(
    bundle: Bundle,
    models: Mapping[str, TargetModel],
    probes: Probes,
    rounded: Mapping[str, RoundedAnswers],
    threads: int,
) -> tuple[ComponentReport, ...]:
    """Every form of every component; of a component's forms the one that is nearest to failing."""
    found: dict[str, list[ComponentReport]] = {}
    for form in dict.fromkeys(["", *(form for model in models.values() for form in model.forms)]):
        for part in check_components(
            opener(bundle, threads, form or None),
            probes,
            target=bundle.manifest.target.name,
            precisions={name: model.precision for name, model in models.items() if not form or form in model.forms},
            time_embedding=bundle.manifest.time_embedding.model_dump(),
            rounded=rounded,
        ):
            found.setdefault(part.component, []).append(replace(part, form=form))
    return tuple(sorted((worst_form(parts) for parts in found.values()), key=lambda part: part.margin_db))


def _picture_plan(bundle: Bundle, checkpoint: Checkpoint, choice: PictureChoice, pictures: bool) -> ProbePlan:
    """The gate's prompts, each with `choice.seeds` seeds. Noise of stochastic solvers follows the seed on both sides.

    Raises:
        UsageError: pictures are not wanted at all, or the bundle carries no such schedule.
    """
    from ..export.scheduler import default_scheduler

    if not pictures:
        raise UsageError("--seeds, --scheduler and --steps choose pictures", hint="add --image")
    gates = plan_for(checkpoint, bundle.manifest.size)
    own = choice.scheduler in (None, default_scheduler(checkpoint.scheduler))
    steps = gates.steps if own and choice.steps is None else choice.steps
    schedule = bundle.schedule(choice.scheduler or default_scheduler(checkpoint.scheduler), steps)
    return replace(
        gates,
        prompts=gates.prompts * choice.seeds,
        texts=(),
        picked=(),
        steps=schedule.steps,
        scheduler=schedule.scheduler,
    )


def refuse_prompts(pictures: bool, checkpoint: Checkpoint) -> None:
    """Raise UsageError unless pictures are drawn, and of the demo: the oracle knows no other."""
    from .reference.scenes import knows

    if not pictures:
        raise UsageError("--prompts needs pictures", hint="add --image")
    if not knows(checkpoint.sources.values()):
        raise UsageError(
            "--prompts counts captions for the oracle, which knows only the embedded demo checkpoint",
            hint="leave it out for other checkpoints",
        )


def _with_pictures(
    report: ParityReport,
    bundle: Bundle,
    checkpoint: Checkpoint,
    plans: Mapping[str, Plan],
    precision: str,
    threads: int,
    chosen: ProbePlan | None,
    keep: Callable[[Picture, Drawn], None],
    curve_of: Callable[..., TimestepCurve] | None,
    oracle_count: int | None,
    run: Runner,
    progress: Progress,
) -> ParityReport:
    from ..export.scheduler import default_scheduler
    from .reference import scenes as world
    from .reference.pytorch import ReferenceProbes
    from .tolerances import image_tolerance

    target, size = bundle.manifest.target.name, bundle.manifest.size
    own = default_scheduler(checkpoint.scheduler)  # PyTorch drew with it, whatever the bundle's default is
    with kept_open(opener(bundle, threads)) as open_component:

        def drawn(picture: Picture, plan: ProbePlan) -> Drawn:
            schedule = bundle.schedule(plan.scheduler or own, plan.steps)
            models = replace(painter(bundle, schedule, threads), open=open_component)
            how: dict[str, Any] = {"guidance": plan.guidance, "seed": picture.seed, **pictures_for(models)}
            result = draw(models, picture.prompt, keep_trajectory=True, **how)
            return Drawn(result.trajectory, result.image)

        probes = run(ReferenceProbes(checkpoint, size, chosen)) if chosen else ask_pytorch(checkpoint, size, run)
        with progress.running(f"{target} pictures"):
            found = check_pictures(drawn, probes, limit=image_tolerance(target, precision), keep=keep)
        report = replace(report, image=beside_rounding(found, checkpoint, plans, probes, run))
        if curve_of and not found.problem:
            report = replace(
                report,
                timesteps=curve_of(pictures=probes.plan, open_component=open_component, run=run, progress=progress),
            )
        if oracle_count is None:
            return report
        scenes = world.oracle_prompts(oracle_count, seed=0)
        pictures = run(ReferenceProbes(checkpoint, size, oracle_plan(scenes)))
        with progress.running(f"{target} oracle, {oracle_count} pictures"):
            return replace(report, oracle=check_oracle(drawn, pictures, scenes, precision))
