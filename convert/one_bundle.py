"""One target's bundle, ready to be written: its models, all that an app needs beside them, and what was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version as version_of
from typing import TYPE_CHECKING, Any

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
from ..stages.cache import Cache
from ..stages.progress import Progress
from ..validate.goldens.of_bundle import with_goldens
from ..validate.machines.manifest_section import with_arithmetic
from .auto import choose
from .build import Built, TargetBuild
from .conversion import Converted
from .destination import Destination
from .sampling import conditioning_entry, control_entry, noted

if TYPE_CHECKING:
    from ..export.accessories import Tokenizer
    from ..runtimes.protocol import Target
    from ..validate.machines.report import MachineReport
    from ..validate.report import ParityReport
    from .job import Job
    from .ledger import Ledger
    from .shared import Shared


@dataclass(frozen=True, slots=True)
class ReadyBundle:
    """What will be written, and where."""

    place: Destination
    inputs: PackInputs
    parity: ParityReport | None
    machines: tuple[MachineReport, ...]

    def publish(self) -> Converted:
        """Write it; see `Destination.publish`."""
        return Converted(self.place.publish(self.inputs, self.parity, self.machines), self.parity, self.machines)


def make_ready(job: Job, shared: Shared, name: str, run: Ledger, cache: Cache, progress: Progress) -> ReadyBundle:
    """Build and prove the bundle for target `name`; goldens and machines follow only where the gates passed."""
    target, request = job.targets[name], job.request
    work = TargetBuild(job, shared, target, run, progress)
    built = choose(work) if job.is_automatic else work.built()
    inputs = _pack_inputs(job, shared, target, built)
    if request.record_memory:
        inputs = replace(inputs, memory=_with_measured(inputs.memory, run.run_mib(name)))
    sound = built.parity is None or built.parity.ok
    if job.recipe.bundle.goldens and sound:
        inputs = with_goldens(inputs, cache.root / "work", run)
    inputs, machines = with_arithmetic(inputs, request.machines if sound else (), cache, run, progress.say)
    return ReadyBundle(job.places[name], inputs, built.parity, machines)


def _pack_inputs(job: Job, shared: Shared, target: Target, built: Built) -> PackInputs:
    checkpoint, schedules, parity = job.checkpoint, shared.schedules, built.parity
    proven = {part.component: part.loss for part in parity.components if part.loss} if parity else {}
    gate: Gate = "skipped by --no-gate" if parity is None else "passed" if parity.ok else "failed"
    return PackInputs(
        checkpoint=checkpoint,
        target=TargetEntry(name=target.name, version=target.version(), min_runtime=target.min_runtime),
        models=tuple(noted(model, checkpoint) for model in built.models.values()),
        tokenizers=tuple((each.folder, _tokenizer_facts(each)) for each in shared.tokenizers),
        schedules=tuple(schedules.read(name, steps) for name, steps in schedules.compiled),
        guidance=GuidanceEntry(mode=job.sampling.mode, default=job.sampling.guidance),
        conditioning=conditioning_entry(checkpoint),
        control=control_entry(checkpoint, job.pixels),
        vae=vae_entry(*(checkpoint.components[half].config for half in ("vae_decoder", "vae_encoder"))),
        time_embedding=TimeEmbedding(**time_embedding_facts(checkpoint.denoiser.config)),
        size=job.pixels,
        recipe=built.recipe.to_toml(),
        tools={name: version_of(name) for name in target.tools},
        gate=gate,
        adapters=tuple(
            AdapterEntry(file=adapter.label, sha256=checkpoint.sources[adapter.place], scale=adapter.scale)
            for adapter in checkpoint.adapters
        ),
        parity={name: ParityEntry(max_abs=p.max_abs, snr_db=p.snr_db, psnr_db=p.psnr_db) for name, p in proven.items()},
        speed=built.speed,
        memory=MemoryEntry.model_validate({"forecast": job.forecast.run_mib(target.name)}),
        assets=target.assets(checkpoint, job.pixels),
        plans=built.plans,
        shapes=job.parameters,
    )


def _tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    names = ("kind", "max_tokens", "pad_id", "bos_id", "eos_id", "added_tokens")
    return {"files": list(tokenizer.files), **{name: getattr(tokenizer, name) for name in names}}


def _with_measured(memory: MemoryEntry, measured: Mapping[str, float]) -> MemoryEntry:
    return MemoryEntry.model_validate({"forecast": memory.forecast, "measured": measured})
