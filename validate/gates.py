"""Run a conversion's models over the probes and hold the answers against the tolerances."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Literal

import numpy as np

from ..runtimes.inputs import native_feeds
from ..runtimes.protocol import Array, Closing, Session
from ..stages.errors import ModelError, ParityError, ToolCrashed, UsageError
from .error_histogram import spread_of
from .parity import Parity, compare, finite_db, worst
from .reference.probes import Picture, ProbePlan, Probes, RoundedAnswers
from .reference.scenes import Scene
from .report import ComponentReport, ImageReport, OracleReport, PictureReport
from .similarity import ssim
from .tolerances import ImageTolerance, oracle_points, tolerance


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a conversion drew: [1, C, h, w] latents after each call, and the [H, W, 3] picture in 0..1 as floats."""

    trajectory: Sequence[Array]
    image: Array


OpenComponent = Callable[[str], Session]
Draw = Callable[[Picture, ProbePlan], Drawn]
# Of a runtime that dies: a number is missing. Where the report would be kept for ever, the crash must be raised
# instead: it may have been of this moment, for want of memory.
CrashHandling = Literal["report", "raise"]


def check_components(
    open_component: OpenComponent,
    probes: Probes,
    *,
    target: str,
    precisions: Mapping[str, str],
    time_embedding: Mapping[str, Any],
    rounded: Mapping[str, RoundedAnswers] | None = None,
    crashes: CrashHandling = "report",
) -> tuple[ComponentReport, ...]:
    """Compare every component with PyTorch on every probe; the worst component comes first.

    Args:
        open_component: loads the model of a component; sessions are closed here, one is open at a time.
        precisions: component -> precision of its model; these components are checked.
        time_embedding: `runtimes.inputs.time_embedding_facts` of the UNet.
        rounded: answers of the rounded reference, needed for every component that is not fp32.
        crashes: a runtime that dies has its report, or is raised.
    Raises:
        UsageError: a tolerance or the rounded reference of a component is missing: a gate may not vanish.
        ToolCrashed: a runtime died, and `crashes` asks for it.
    """
    reports = []
    for component, precision in precisions.items():
        report = unanswered(component, precision, target)
        answers = None
        if precision != "fp32":
            answers = _answers(component, precision, rounded or {})
        try:
            with open_component(component) as session:
                reports.append(measure(report, session, probes, answers, time_embedding))
        except (ToolCrashed, ParityError) as problem:  # NaN, another shape, a dead runtime: there is no number for it
            if isinstance(problem, ToolCrashed) and crashes == "raise":
                raise
            reports.append(replace(report, problem=problem.what))
    return tuple(sorted(reports, key=lambda report: report.margin_db))


def unanswered(component: str, precision: str, target: str, problem: str = "") -> ComponentReport:
    """The report of a component that was asked nothing yet, or, with a `problem`, that gave no answer."""
    report = ComponentReport(component, precision, tolerance("loss", component, target, precision), None)
    if precision != "fp32":
        report = replace(report, fidelity_tolerance=tolerance("fidelity", component, target, precision))
    return replace(report, problem=problem)


def _answers(component: str, precision: str, rounded: Mapping[str, RoundedAnswers]) -> RoundedAnswers:
    found = rounded.get(component)
    if found is None or found.precision != precision:
        has = f"only {found.precision}" if found else "none"
        raise UsageError(
            f"{component} at {precision} needs PyTorch's answers with equally rounded weights; there is {has}"
        )
    return found


def measure(
    report: ComponentReport,
    session: Session,
    probes: Probes,
    answers: RoundedAnswers | None,
    time_embedding: Mapping[str, Any],
    only: Collection[int] | None = None,
) -> ComponentReport:
    """Run every probe of `report.component`, or `only` some; return the report with the worst that was found.

    Args:
        answers: the rounded reference's, in the order of the probes, or None where there is no such gate.
    Raises:
        ParityError: an answer has another shape, or holds a NaN or an infinity.
    """
    losses: list[tuple[float, str, Parity]] = []
    fidelities: list[Parity] = []
    references: Iterator[Mapping[str, Array] | None] = answers.read(only) if answers else repeat(None)
    for probe, reference in zip(probes.read(report.component, only), references, strict=answers is not None):
        results = session.run(native_feeds(probe.feeds, session.inputs, time_embedding))
        for name, expected in probe.outputs.items():
            if name not in results:
                raise ModelError(f"{report.component} gives {', '.join(results)}; PyTorch calls its output {name!r}")
            where = f"{report.component}, {probe.label}, {name}"
            parity = compare(expected, results[name], where=where)
            losses.append((parity.snr_db, probe.label, parity))
            if reference is not None:
                fidelities.append(compare(reference[name], results[name], where=where))
    return replace(
        report,
        loss=worst([parity for _, _, parity in losses]),
        worst_probe=min(losses, key=lambda each: each[0])[1],
        probes=len(losses),
        fidelity=worst(fidelities) if fidelities else None,
        run_peak_mib=getattr(session, "peak_rss_mib", 0.0),
    )


def check_pictures(
    draw: Draw,
    probes: Probes,
    *,
    limit: ImageTolerance,
    keep: Callable[[Picture, Drawn], None] = lambda _, __: None,
    crashes: CrashHandling = "report",
) -> ImageReport:
    """Draw every picture of the plan from PyTorch's starting noise and compare latents, step by step, and pixels.

    Args:
        draw: generates with the conversion alone; gets the picture's prompt and seed, and the plan's schedule.
        limit: `tolerances.image_tolerance` of the target and the coarsest of the components' precisions.
        keep: is handed each pair, for those who want to show it.
        crashes: a runtime that dies ends the report, or is raised.
    """
    report = undrawn(probes.plan, limit)
    pictures = []
    try:
        for picture in probes.pictures():
            drawn = draw(picture, probes.plan)
            pictures.append(compare_pictures(picture, drawn))
            keep(picture, drawn)
    except (ToolCrashed, ParityError) as problem:
        if isinstance(problem, ToolCrashed) and crashes == "raise":
            raise
        return replace(report, pictures=tuple(pictures), problem=problem.what)
    return replace(report, pictures=tuple(pictures))


def undrawn(plan: ProbePlan, limit: ImageTolerance, problem: str = "") -> ImageReport:
    """The report of pictures none of which is drawn yet, or, with a `problem`, can be."""
    return ImageReport((), limit, plan.steps, plan.guidance, plan.scheduler, problem=problem)


def compare_pictures(reference: Picture, drawn: Drawn) -> PictureReport:
    """The distance of what was drawn from PyTorch's picture, of the latents after each call and of the pixels.

    Raises:
        ParityError: it took another number of calls, or holds a NaN.
    """
    calls = len(drawn.trajectory)
    if calls != len(reference.trajectory):
        raise ParityError(f"{reference.prompt!r} took {calls} steps instead of {len(reference.trajectory)}")
    steps = [
        compare(ours, theirs, where=f"latents of {reference.prompt!r} after step {step}")
        for step, (ours, theirs) in enumerate(zip(reference.trajectory, drawn.trajectory, strict=True), start=1)
    ]
    image = compare(reference.image, drawn.image, peak=1.0, where=f"picture of {reference.prompt!r}")
    drift = tuple(finite_db(step.snr_db) for step in steps)
    likeness = ssim(reference.image, drawn.image)
    spread = spread_of(reference.image, drawn.image)
    return PictureReport(reference.prompt, reference.seed, steps[-1], image, likeness, drift, spread)


@contextmanager
def kept_open(open_component: OpenComponent) -> Iterator[OpenComponent]:
    """Yield an opener that loads each component once and closes them all at the end.

    For many pictures of a small model: starting three processes a picture would cost more than drawing it.
    All components are in memory at once.
    """
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}

        def borrow(component: str) -> Session:
            if component not in sessions:
                sessions[component] = stack.enter_context(open_component(component))
            return _Borrowed(sessions[component])

        yield borrow


class _Borrowed(Closing):
    """A session that its borrower cannot close."""

    def __init__(self, session: Session) -> None:
        self.inputs, self.outputs, self.run = session.inputs, session.outputs, session.run

    def close(self) -> None:
        """Nothing: the lender closes."""


def check_oracle(draw: Draw, probes: Probes, scenes: Sequence[Scene], precision: str) -> OracleReport:
    """Grade the conversion's pictures and PyTorch's.

    Args:
        scenes: those whose captions are the plan's prompts.
        precision: the coarsest of the components', which sets how many points may be lost.
    """
    from .reference.oracle import grade

    if tuple(scene.caption for scene in scenes) != probes.plan.prompts:
        raise UsageError("the oracle's scenes are not the captions that PyTorch has drawn")
    ours, theirs = [], []
    for scene, picture in zip(scenes, probes.pictures(), strict=True):
        ours.append(grade(_eight_bit(draw(picture, probes.plan).image), scene).ok)
        theirs.append(grade(_eight_bit(picture.image), scene).ok)
    return OracleReport(100 * float(np.mean(ours)), 100 * float(np.mean(theirs)), len(scenes), oracle_points(precision))


def _eight_bit(image: Array) -> Array:
    return np.asarray(np.rint(image * 255).astype(np.uint8))
