"""`validate --layers`: which of PyTorch's modules goes wrong in a model, within the memory of one model.

PyTorch runs once over the inputs with the worst result and leaves what its modules hand to each other on the disk;
then the runtime's graph is run in pieces against that. docs/decisions/0045.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from shutil import rmtree
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...runtimes.inputs import native_feeds
from ...runtimes.registry import get_target
from ...runtimes.taps import Tapped
from ...stages.child import run_in_child
from ...stages.errors import UsageError
from ...stages.publish import scratch_folder
from ...stages.run_stage import run_stage
from ...stages.stage import label_of
from .advice import rule_for
from .examine import Findings, layers_of
from .pieces import groups_of, pieces_of
from .points import FindPoints, Points
from .report import ComponentLayers, Range
from .segments import reshaped, segments_of, taps_of
from .stage import ExaminePieces
from .trace import MeasurePeaks, Peaks, TracePoints

if TYPE_CHECKING:
    from ...quantize.plan import Plan, Shapes
    from ...stages.artifacts import ComponentSource, TargetModel
    from ...stages.cache import Cache
    from ...stages.progress import Progress
    from ...stages.stage import Runner, Stage
    from ..reference.probes import Probes
    from ..report import ComponentReport

DISK_BYTES: Final = 2**32
"""Tensors of PyTorch's on the disk at a time; a component with more is run again for the rest."""


def look_into(
    model: TargetModel,
    source: ComponentSource,
    plan: Plan,
    report: ComponentReport,
    probes: Probes,
    *,
    time_embedding: Mapping[str, Any],
    threads: int,
    cache: Cache,
    progress: Progress,
) -> ComponentLayers:
    """Measure every module of one component of a bundle.

    Args:
        report: what the component as a whole came to; its worst probe is run here.
    Raises:
        UsageError: the target cannot be looked into.
    """
    from pydantic import TypeAdapter

    from ...checkpoints.weights import Weights

    started = monotonic()
    run: Runner = partial(run_stage, cache=cache, progress=progress)
    target = get_target(model.target)
    if not isinstance(target, Tapped):
        raise UsageError(f"target {model.target!r} cannot be looked into", hint="leave out --layers")
    found: Points = run(FindPoints(source, probes.size))
    peaks: Peaks = run(MeasurePeaks(probes, source, found.events, len(found.points)))
    wiring = target.wiring(model, source, probes.size, run)
    labels = probes.labels[source.component]
    number = labels.index(report.worst_probe) if report.worst_probe in labels else 0
    (probe,) = islice(probes.read(source.component), number, number + 1)
    inputs = native_feeds(probe.feeds, model.inputs, time_embedding)
    taps = taps_of(wiring, found.points)
    weights = Weights(source)
    shapes = {name: weights.spec(name)[1] for name in weights.names()}
    segments = segments_of(
        wiring, taps, inputs, _rounding(plan, shapes), half=any(scheme.computes_half for scheme in plan.schemes)
    )
    rounded = model.precision != "fp32"
    at = {tensor: point.index for tensor, point in taps.items()}
    size = [point.bytes for point in found.points]
    pieces = pieces_of(
        segments,
        {tensor: size[point] for tensor, point in at.items()},
        forced=2 if rounded else 1,
        streamed=wiring.streamed,
    )
    findings, runs, peak = [], 0, 0.0
    with scratch_folder(cache.root / "work", "layers") as folder:
        (folder / "own").mkdir()
        (folder / "out").mkdir()
        np.savez(folder / "inputs.npz", allow_pickle=False, **inputs)
        for group in groups_of(pieces, lambda piece: piece.points(at), size, DISK_BYTES):
            wanted = tuple(sorted(set().union(*(piece.points(at) for piece in group))))
            traces = {"reference": plan, **({"full": type(plan)("fp32")} if rounded else {})}
            for name, stored in traces.items():
                trace = _trace(probes, source, stored, number, found, wanted, threads, run)
                (folder / name).mkdir()
                _run_apart(trace, folder / name, cache, progress)
            stage = ExaminePieces(
                model,
                group,
                at,
                folder / "inputs.npz",
                folder / "reference",
                folder / "full" if rounded else None,
                folder / "own",
                wiring.batchless,
                wiring.flat,
                reshaped(wiring, taps),
                threads,
            )
            facts, measured = _run_apart(stage, folder / "out", cache, progress)
            findings.append(TypeAdapter(Findings).validate_python(facts["findings"]))
            runs += facts["partial_runs"]
            peak = max(peak, measured["own_peak_mib"])
            for name in traces:
                rmtree(folder / name)
    layers = layers_of(segments, findings)
    gate, parity = report.tolerance, report.loss
    if report.fidelity_tolerance:
        gate, parity = report.fidelity_tolerance, report.fidelity
    advised = {each.module: rule_for(target, model.component, each.module, plan, shapes) for each in layers}
    return ComponentLayers(
        report.component,
        report.precision,
        labels[number],
        layers,
        ranges_of(found, peaks, labels),
        gate.min_snr_db,
        runs,
        peak,
        parity.snr_db if parity else None,
        report.run_peak_mib,
        monotonic() - started,
        {module: rule for module, rule in advised.items() if rule},
    )


def _rounding(plan: Plan, shapes: Shapes) -> frozenset[str]:
    """The modules that round what they read to 8 bits."""
    rounded = [name for name, shape in shapes.items() if plan.scheme(name, shape).activation_bits == 8]
    return frozenset(name.rpartition(".")[0] for name in rounded)


def _trace(
    probes: Probes,
    source: ComponentSource,
    plan: Plan,
    number: int,
    found: Points,
    wanted: tuple[int, ...],
    threads: int,
    run: Runner,
) -> TracePoints:
    from ...quantize.quantized import quantized_weights

    codes = quantized_weights(source, plan, run)
    return TracePoints(probes, source, plan, codes, number, found.events, wanted, threads)


def _run_apart(
    stage: Stage[Any], into: Path, cache: Cache, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a stage in a child process without the cache."""
    with progress.running(label_of(stage)) as watch:
        return run_in_child(stage, into, cache.root / "work", watch)


def ranges_of(found: Points, peaks: Peaks, labels: Sequence[str]) -> tuple[Range, ...]:
    return tuple(
        Range(point.module, point.kind, peaks.largest[point.index], labels[peaks.at[point.index]])
        for point in found.points
        if point.module  # else it is hardly more than an input
    )
