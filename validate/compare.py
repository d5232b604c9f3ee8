"""`compare`: two bundles on the same feeds. Neither PyTorch nor the checkpoint is needed."""

from __future__ import annotations

import math
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..bundle.bundle import Bundle
from ..bundle.provenance import differences
from ..bundle.sessions import opener, painter
from ..runtimes.inputs import pytorch_inputs
from ..runtimes.txt2img.generate import draw
from ..stages.artifacts import TensorSpec, role_of, with_role
from ..stages.errors import ParityError, ToolCrashed, UsageError
from ..stages.progress import Progress
from .bundle_difference import Comparison, Contrast, Side
from .bundle_probes import ask_bundle
from .gate import calls_are_cheap
from .gates import Drawn, OpenComponent, check_pictures, kept_open, measure
from .reference.probes import Picture, ProbePlan, Probes, pictures_for
from .reference.prompts import prompts_for
from .report import ComponentReport
from .speed.measure import busy, measure_bundles
from .tolerances import ImageTolerance, Tolerance, apart, image_tolerance, pictures_apart, tolerance

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest
    from ..bundle.manifest_entries import ComponentEntry
    from ..export.compiled_schedule import CompiledSchedule
    from .speed.latency import ComponentProfile

RUNS: Final = 5
LEAST_GUIDANCE: Final = 1.5
"""Of a model whose default is none: without guidance the unconditional runs would not be compared."""


def compare_bundles(
    first: Bundle,
    second: Bundle,
    *,
    image: bool | None = None,
    speed: bool | None = None,
    threads: int = 2,
    keep: Callable[[Picture, Drawn], None] = lambda _, __: None,
    progress: Progress,
) -> tuple[Comparison, list[str]]:
    """Ask both the same; return what differs, and remarks for people.

    Args:
        image: draw pictures with both; None: where that takes seconds.
        speed: time them, taking turns; None: where that takes seconds.
        keep: is handed each picture of both.
    Raises:
        BundleError: a file of one differs from its manifest.
        UsageError: their models do not take the same inputs, so there is nothing to compare.
        MissingTool: the runtime of one is not installed.
    """
    for bundle in (first, second):
        bundle.refuse_damage()
    shared = _shared(first, second)
    cheap = calls_are_cheap(first.manifest) and calls_are_cheap(second.manifest)
    gated = first.manifest.provenance.checkpoint == second.manifest.provenance.checkpoint
    remarks = []
    if not gated:
        remarks.append("the bundles were made from different checkpoints: they need not agree")
    schedule, common = _schedule(first, second, cheap)
    if not common:
        remarks.append("no pictures are compared: the bundles have no schedule in common")
    elif image is None and not cheap:
        remarks.append("no pictures were drawn, because that takes long: ask for them with --image")
    plan, guidance = _plan(first, schedule, cheap), _guidance(first.manifest)
    a, b = opener(first, threads), opener(second, threads)
    label_a, label_b = _labels(first, second)
    with ExitStack() as stack:
        into = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="diffusette-compare-")))
        with progress.running(f"{label_a} draws"), kept_open(a) as keeping:
            asked = replace(painter(first, schedule, threads), open=keeping if cheap else a)
            probes = ask_bundle(asked, plan, into, guidance=guidance, encoder=bool(with_role("encoder", shared)))
        parts = []
        for name in shared:
            with progress.running(f"{label_b} {name}"):
                limit = _limit(name, first.manifest, second.manifest) if gated else None
                parts.append(_contrast(name, b, second.manifest, probes, limit))
        found = None
        if common and (cheap if image is None else image):
            with progress.running(f"{label_b} draws"), kept_open(b) as keeping:
                other = replace(
                    painter(second, second.schedule(schedule.scheduler, schedule.steps), threads),
                    open=keeping if cheap else b,
                )

                def drawn(picture: Picture, plan: ProbePlan) -> Drawn:
                    how: dict[str, Any] = {"guidance": guidance, "seed": picture.seed, **pictures_for(other)}
                    result = draw(other, picture.prompt, keep_trajectory=True, **how)
                    return Drawn(result.trajectory, result.image)

                wanted = _picture_limit(first.manifest, second.manifest, gated)
                found = replace(check_pictures(drawn, probes, limit=wanted, keep=keep), guidance=guidance)
    times: dict[str, tuple[ComponentProfile, ComponentProfile]] = {}
    if cheap if speed is None else speed:
        both = measure_bundles([first, second], runs=RUNS, threads=threads, components=shared, progress=progress)
        times = {one.component: (one, two) for one, two in zip(both[0].components, both[1].components, strict=True)}
    parts.sort(key=lambda part: part.parity.snr_db if part.parity else -math.inf)
    return Comparison(
        _side(first, label_a),
        _side(second, label_b),
        tuple(parts),
        tuple(_alone(first, second, label_a, label_b)),
        found,
        times,
        tuple(differences(first.manifest, second.manifest)),
        gated,
        busy() if times else None,
    ), remarks


def _shared(first: Bundle, second: Bundle) -> tuple[str, ...]:
    """Components that both have; refuses pairs whose models do not take the same inputs."""
    if first.manifest.size != second.manifest.size:
        sizes = " and ".join(
            f"{bundle.path.name}: {h} x {w}" for bundle in (first, second) for h, w in [bundle.manifest.size]
        )
        raise UsageError(f"the bundles draw pictures of different sizes ({sizes})", hint="convert with the same --size")
    shared = tuple(name for name in first.manifest.components if name in second.manifest.components)
    if not {"denoiser", "decoder"} <= set(map(role_of, shared)):
        raise UsageError(f"the bundles share only {', '.join(shared) or 'nothing'}", hint="both need a UNet and a VAE")
    for name in shared:
        mine, theirs = (_takes(bundle.manifest.components[name]) for bundle in (first, second))
        if mine != theirs:
            raise UsageError(
                f"{name} takes {mine} in {first.path} and {theirs} in {second.path}: these are different models",
                hint="compare bundles of one architecture",
            )
    return shared


def _takes(entry: ComponentEntry) -> dict[str, tuple[int, ...]]:
    """Inputs by PyTorch's names; what the host computes for a runtime is that runtime's own affair."""
    specs = (TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in entry.inputs)
    return {spec.name: spec.shape for spec in pytorch_inputs(specs)}


def _schedule(first: Bundle, second: Bundle, cheap: bool) -> tuple[CompiledSchedule, bool]:
    """The schedule to draw with, the default or, where calls are dear, the shortest; and whether both have it."""
    every = first.schedules()
    theirs = {(each.scheduler, each.steps) for each in second.schedules()}
    common = [each for each in every if (each.scheduler, each.steps) in theirs]
    candidates = common or list(every)
    return candidates[0] if cheap else min(candidates, key=lambda each: each.steps), bool(common)


def _plan(bundle: Bundle, schedule: CompiledSchedule, cheap: bool) -> ProbePlan:
    manifest = bundle.manifest
    (tokenizer,) = {(bundle.path / file.path).parent for file in manifest.tokenizer.files}
    last, mode = len(schedule.rows) - 1, manifest.guidance.mode
    steps = sorted({round(last * part) for part in ((0, 1 / 3, 2 / 3, 1) if cheap else (0, 1))})
    return ProbePlan(
        prompts_for(tokenizer, 4 if cheap else 1),
        steps=last + 1,
        picked=tuple((step, "conditional") for step in steps),
        guidance=_guidance(manifest),
        guidance_mode=mode,
        scheduler=schedule.scheduler,
    )


def _guidance(manifest: Manifest) -> float:
    """What both are asked to follow: the bundle's default, but enough for both branches where there are two."""
    mode, default = manifest.guidance.mode, manifest.guidance.default
    return LEAST_GUIDANCE if mode == "cfg" and default <= 1 else default


def _limit(name: str, first: Manifest, second: Manifest) -> Tolerance:
    """How far two models may lie apart that each keep their own distance from PyTorch (triangle inequality)."""
    entries = [manifest.components[name] for manifest in (first, second)]
    precisions = [entry.precision for entry in entries]
    alike = precisions[0] == precisions[1] != "fp32" and _quantize(first) == _quantize(second)
    gate: Final = "fidelity" if alike else "loss"
    limits = [
        tolerance(gate, name, manifest.target.name, precision)
        for manifest, precision in zip((first, second), precisions, strict=True)
    ]
    common = "PyTorch with equally rounded weights" if alike else "PyTorch"
    why = f"each passes at {limits[0].min_snr_db:g} and {limits[1].min_snr_db:g} dB from {common}; errors add at worst"
    return Tolerance(apart(limits[0].min_snr_db, limits[1].min_snr_db), why)


def _quantize(manifest: Manifest) -> object:
    return tomllib.loads(manifest.recipe).get("quantize")


def _picture_limit(first: Manifest, second: Manifest, gated: bool) -> ImageTolerance:
    if not gated:
        return ImageTolerance(0.0, "different checkpoints: they need not agree")
    limits = []
    for manifest in (first, second):
        coarsest = min(manifest.components.values(), key=lambda entry: entry.bits_per_weight).precision
        limits.append(image_tolerance(manifest.target.name, coarsest).min_psnr_db)
    why = f"each passes at {limits[0]:g} and {limits[1]:g} dB from PyTorch; errors add at worst"
    return ImageTolerance(pictures_apart(limits[0], limits[1]), why)


def _contrast(
    name: str, open_component: OpenComponent, manifest: Manifest, probes: Probes, limit: Tolerance | None
) -> Contrast:
    report = ComponentReport(name, "", limit or Tolerance(0.0, ""), loss=None)
    try:
        with open_component(name) as session:
            found = measure(report, session, probes, None, manifest.time_embedding.model_dump())
    except (ToolCrashed, ParityError) as problem:
        return Contrast(name, None, limit, problem=problem.what)
    return Contrast(name, found.loss, limit, found.worst_probe, found.probes)


def _labels(first: Bundle, second: Bundle) -> tuple[str, str]:
    """What tells them apart: the runtime, else the folder's name, else the path."""
    pairs: Sequence[Callable[[Bundle], str]] = (
        lambda bundle: bundle.manifest.target.name,
        lambda bundle: bundle.path.name,
        lambda bundle: f"{bundle.path.parent.name}/{bundle.path.name}",
        lambda bundle: str(bundle.path),
    )
    for tell in pairs:
        if tell(first) != tell(second):
            return tell(first), tell(second)
    return f"{first.path.name} (A)", f"{second.path.name} (B)"


def _side(bundle: Bundle, label: str) -> Side:
    facts = bundle.manifest
    return Side(
        label,
        facts.name,
        facts.target.name,
        facts.target.version,
        {name: entry.precision for name, entry in facts.components.items()},
        {name: sum(file.bytes for file in entry.files) for name, entry in facts.components.items()},
    )


def _alone(first: Bundle, second: Bundle, label_a: str, label_b: str) -> Iterator[str]:
    for one, other, label in ((first, second, label_a), (second, first, label_b)):
        for name in one.components:
            if name not in other.components:
                yield f"{name} only in {label}"
