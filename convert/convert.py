"""The whole conversion, in order, on one page."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.manifest import MANIFEST
from ..stages.artifacts import ALONE, Checkpoint, Companions
from ..stages.cache import CAP, Cache
from ..stages.errors import CheckpointError, UsageError
from ..stages.extras import require_converter
from ..stages.hashing import sha256_of_file
from ..stages.progress import Progress, Silent
from .conversion import Conversion, Converted
from .recipe import Recipe, load_recipe, merged, parameters_of
from .recipe_tables import AUTO

if TYPE_CHECKING:
    from ..bundle.manifest_entries import MemoryEntry
    from ..export.accessories import Schedules, Tokenizer
    from ..quantize.plan import Plan
    from ..runtimes.machines.machine import Machine
    from ..runtimes.protocol import Target
    from ..stages.stage import Runner
    from .auto import Built
    from .forecast import Forecast
    from .sampling import Sampling
    from .search.goal import Goal


def convert(
    checkpoint: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    targets: tuple[str, ...] = (),
    precision: str | None = None,
    goal: Goal | None = None,
    size: tuple[int, int] | None = None,
    companions: Companions = ALONE,
    gate: bool = True,
    goldens: bool = False,
    overwrite: bool = False,
    ignore_forecast: bool = False,
    record_memory: bool = False,
    machines: Sequence[Machine] = (),
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert `checkpoint` as `recipe` says; each bundle appears whole or not at all.

    Args:
        checkpoint: a diffusers folder, a single file of the original code, or "demo".
        output: the bundle's folder; with several targets, the parent of one folder a target.
        targets: names of runtimes; none: the recipe's, else all of them.
        goal: search for the bits of each layer, in place of the recipe's rules; the recipe that was found, and a plot,
            are written beside the bundle.
        companions: what is given beside the checkpoint: a VAE, a tokenizer, configurations.
        gate: compare every model with PyTorch; a bundle that drifted is put at `OUTPUT.rejected`.
        goldens: put golden vectors into each bundle, as `[bundle] goldens = true` in a recipe does.
        overwrite: replace bundles that are already at `output`.
        record_memory: put what the gates' processes took into the manifests, which are then no longer equal for equal
            inputs.
        machines: run each bundle on these before it is written, and put what they computed into its manifest.
    Raises:
        DiffusetteError: see `errors`; nothing at `output` has changed then.
    """
    require_converter("a conversion")
    from ..checkpoints.checkpoint import open_checkpoint
    from ..quantize.plan import Plan
    from ..runtimes.checks import refuse_schemes
    from ..runtimes.registry import TARGETS, get_target
    from ..stages.run_stage import run_stage
    from ..validate.goldens.of_bundle import with_goldens
    from ..validate.machines.manifest_section import with_arithmetic
    from ..validate.reference.calibrate import calibrated, refuse_activations
    from .auto import OneTarget
    from .destination import Destination
    from .forecast import forecast, refuse_if_too_small
    from .hindsight import Ledger, compared
    from .sampling import recipe_for, sampling_of
    from .search.search_beside import search_beside

    started = time.monotonic()
    progress = progress or Silent()
    cache = cache or Cache.default()
    cache.cap()  # a mistake in it is told now, and not after the work
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe or recipe_for(checkpoint, companions))
    names = targets or ((chosen.target.name,) if chosen.target.name else tuple(TARGETS))
    runtimes = {name: get_target(name, **chosen.target_options(name)) for name in dict.fromkeys(names)}
    if precision is not None and precision != AUTO:
        for runtime in runtimes.values():
            refuse_schemes(runtime, "any component", Plan(precision))
    chosen = merged(chosen, precision=precision, size=size, goldens=goldens)
    for runtime in runtimes.values():
        runtime.require_build()  # fail in the first second, not after the export

    source = open_checkpoint(checkpoint, companions=companions, memo=cache.memo)
    chosen.check_family(source)
    sampling = sampling_of(source, chosen)
    parameters = parameters_of(source)
    found = None
    if goal is not None:
        found = search_beside(Path(output), source, chosen, tuple(runtimes.values()), goal, overwrite, cache, progress)
        chosen = found.recipe
    if machines and not gate:
        raise UsageError("--machine compares with PyTorch, as the gates do", hint="leave out --no-gate")
    automatic = chosen.quantize.precision == AUTO
    if record_memory and not gate:
        raise UsageError("--record-memory needs the gates, which run the models", hint="leave out --no-gate")
    if automatic and not gate:
        raise UsageError("precision auto needs the gates", hint="leave out --no-gate, or name a precision")
    # what auto will take is not known yet; float32 is built in any case, to be raced against
    plans = (chosen.settled("fp32") if automatic else chosen).plans(parameters)
    for runtime in runtimes.values():
        _refuse_unsupported(runtime, source, plans)
        refuse_activations(runtime, chosen.rounding, plans)
    precisions = {part: plan.label for part, plan in plans.items()}
    pixels = chosen.size_for(source)
    root = Path(os.path.realpath(output))
    places = {name: Destination(root / name if len(runtimes) > 1 else root, overwrite) for name in runtimes}
    for name, place in places.items():
        place.refuse_if_taken(source, name, pixels, None if automatic else precisions)
    needed = forecast(source, tuple(runtimes), precisions, pixels, gate=gate)
    if not ignore_forecast:
        refuse_if_too_small(needed, cache.root, Path(output))
    cache.remember_source(source.digest, source.root, source.companions)
    for remark in source.remarks:
        progress.say(remark)

    with cache.used():  # nobody may prune what later stages read
        run = Ledger(partial(run_stage, cache=cache, progress=progress), cache)
        tokenizers, schedules = _accessories(source, chosen, sampling, run)
        plans = calibrated(plans, source, pixels, chosen.rounding, run)
        if found:
            plans = {part: replace(plan, rounded_with=found.schemes) for part, plan in plans.items()}
        for remark in schedules.remarks():
            progress.say(remark)
        moved = _movements(source, run, progress)
        proven = []
        for name, runtime in runtimes.items():
            work = OneTarget(source, runtime, pixels, tokenizers, schedules, run, progress)
            built = work.choose(chosen, parameters) if automatic else work.built(chosen, plans, parameters, gate=gate)
            inputs = _pack_inputs(source, built, sampling, runtime, tokenizers, schedules, pixels, needed)
            inputs = replace(inputs, plans=built.plans, shapes=parameters)
            if record_memory:
                inputs = replace(inputs, memory=_with_measured(inputs.memory, run.run_mib(name)))
            if chosen.bundle.goldens and (built.parity is None or built.parity.ok):
                inputs = with_goldens(inputs, cache.root / "work", run)
            sound = built.parity is None or built.parity.ok
            inputs, on_machines = with_arithmetic(inputs, machines if sound else (), cache, run, progress.say)
            proven.append((places[name], inputs, built.parity, on_machines))
        converted = [  # only now does anything at `output` change
            Converted(place.publish(inputs, parity, on_machines), parity, on_machines)
            for place, inputs, parity, on_machines in proven
        ]
        taken = run.taken()
        beside = () if automatic else compared(needed, taken)  # what `auto` tries is not known beforehand
        for each in converted if beside else ():
            digest = sha256_of_file(each.bundle.path / MANIFEST)
            cache.remember_memory(digest, [stage.to_json() for stage in beside])
    if gone := cache.keep_to_cap():
        progress.say(f"{len(gone)} of the longest unused stages left the cache, which {CAP} limits")
    took = time.monotonic() - started
    peak, stages = getattr(progress, "peak_mib", 0.0), tuple(getattr(progress, "stages", ()))
    return Conversion(tuple(converted), needed, took, peak, stages, moved, found, beside, taken)


def _with_measured(memory: MemoryEntry, measured: Mapping[str, float]) -> MemoryEntry:
    from ..bundle.manifest_entries import MemoryEntry

    return MemoryEntry.model_validate({"forecast": memory.forecast, "measured": measured})


def _refuse_unsupported(runtime: Target, source: Checkpoint, plans: Mapping[str, Plan]) -> None:
    from ..runtimes.checks import refuse_schemes

    if source.family not in runtime.families:
        raise UsageError(
            f"target {runtime.name!r} does not run family {source.family!r}",
            hint=f"it runs: {', '.join(runtime.families)}",
        )
    for part, plan in plans.items():
        refuse_schemes(runtime, part, plan)


def _movements(source: Checkpoint, run: Runner, progress: Progress) -> dict[str, dict[str, float]]:
    """How far adapters move each weight, by component; said in a line each."""
    from ..checkpoints.adapters.movement import MeasureMovement

    moved = {}
    for name, part in source.components.items():
        if any(change.kind != "rows" for change in part.adapted):
            movement = run(MeasureMovement(part))
            progress.say(movement.summary())
            moved[name] = movement.read()
    return moved


def _accessories(
    source: Checkpoint, recipe: Recipe, sampling: Sampling, run: Runner
) -> tuple[tuple[Tokenizer, ...], Schedules]:
    from ..checkpoints.families import reference_pipeline
    from ..export.accessories import CompileSchedules, WriteTokenizer
    from ..validate.reference.probes import plan_for

    if "text_encoder_2" in source.components and source.tokenizer_2 is None:
        raise CheckpointError(
            f"{source.root}: the second text encoder has no tokenizer", hint="convert it from a diffusers folder"
        )
    tokenizers = []
    for folder, prefix in ((source.tokenizer, "tokenizer/"), (source.tokenizer_2, "tokenizer_2/")):
        if folder is not None:
            files = {f.removeprefix(prefix): h for f, h in source.sources.items() if f.startswith(prefix)}
            tokenizers.append(run(WriteTokenizer(folder, files, source.words)))
    # the gate draws its pictures with the checkpoint's own scheduler, whatever the recipe's default is
    gates = plan_for(source, recipe.size_for(source)).steps
    wanted = [(recipe.schedule.default, sampling.steps), ("checkpoint", gates)]
    wanted += [(other.name, steps) for other in recipe.schedule.also for steps in other.steps]
    compiled = CompileSchedules(
        source.scheduler, tuple(dict.fromkeys(wanted)), reference_pipeline(source), recipe.schedule.timesteps
    )
    return tuple(tokenizers), run(compiled)


def _pack_inputs(
    source: Checkpoint,
    built: Built,
    sampling: Sampling,
    runtime: Target,
    tokenizers: tuple[Tokenizer, ...],
    schedules: Schedules,
    pixels: tuple[int, int],
    needed: Forecast,
) -> Any:
    from ..bundle.manifest import Gate
    from ..bundle.manifest_entries import (
        AdapterEntry,
        GuidanceEntry,
        MemoryEntry,
        ParityEntry,
        TargetEntry,
        TimeEmbedding,
    )
    from ..bundle.pack_inputs import PackInputs, vae_entry
    from ..runtimes.inputs import time_embedding_facts
    from .sampling import conditioning_entry, control_entry, noted

    recipe, parity = built.recipe, built.parity
    proven = {p.component: p.loss for p in parity.components if p.loss} if parity else {}
    gate: Gate = "skipped by --no-gate" if parity is None else "passed" if parity.ok else "failed"
    return PackInputs(
        checkpoint=source,
        target=TargetEntry(name=runtime.name, version=runtime.version(), min_runtime=runtime.min_runtime),
        models=tuple(noted(model, source) for model in built.models.values()),
        tokenizers=tuple((each.folder, _tokenizer_facts(each)) for each in tokenizers),
        schedules=tuple(schedules.read(name, steps) for name, steps in schedules.compiled),
        guidance=GuidanceEntry(mode=sampling.mode, default=sampling.guidance),
        conditioning=conditioning_entry(source),
        control=control_entry(source, pixels),
        vae=vae_entry(*(source.components[half].config for half in ("vae_decoder", "vae_encoder"))),
        time_embedding=TimeEmbedding(**time_embedding_facts(source.components["unet"].config)),
        size=pixels,
        recipe=recipe.to_toml(),
        tools={name: version_of(name) for name in runtime.tools},
        gate=gate,
        adapters=tuple(
            AdapterEntry(file=adapter.label, sha256=source.sources[adapter.place], scale=adapter.scale)
            for adapter in source.adapters
        ),
        parity={name: ParityEntry(max_abs=p.max_abs, snr_db=p.snr_db, psnr_db=p.psnr_db) for name, p in proven.items()},
        speed=built.speed,
        memory=MemoryEntry.model_validate({"forecast": needed.run_mib(runtime.name)}),
        assets=runtime.assets(source, pixels),
    )


def _tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    names = ("kind", "max_tokens", "pad_id", "bos_id", "eos_id", "added_tokens")
    return {"files": list(tokenizer.files), **{name: getattr(tokenizer, name) for name in names}}
