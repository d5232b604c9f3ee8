"""The checkpoint that a bundle was made from: where it lies on this machine, and whether it is that one."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ...bundle.bundle import Bundle
from ...stages.artifacts import ALONE, Companions
from ...stages.cache import Cache
from ...stages.errors import CheckpointError
from ...stages.extras import require_converter

if TYPE_CHECKING:
    from ...bundle.manifest_entries import SourceEntry
    from ...stages.artifacts import Checkpoint

# what a source's label begins with -> the option that gives it
_OPTIONS: Final = {
    "adapters/": "--adapter",
    "vae_decoder/": "--vae-decoder",
    "vae/": "--vae",
    "controlnet/": "--controlnet",
    "tokenizer/": "--tokenizer",
    "tokenizer_2/": "--tokenizer",
}


@dataclass(frozen=True, slots=True)
class Origin:
    """What a user names: a checkpoint, and what was given beside it when it was converted."""

    checkpoint: str | None = None  # None: where this machine converted it
    companions: Companions = ALONE


def open_reference_checkpoint(bundle: Bundle, reference: Origin | str | None, cache: Cache) -> Checkpoint:
    """The checkpoint that `bundle` was made from: `reference`, and for what that leaves open, what this machine knows.

    Raises:
        CheckpointError: it is unknown here, or it is another one than the bundle's: says what differs.
    """
    require_converter("opening a checkpoint")
    from ...checkpoints.checkpoint import open_checkpoint

    wanted = bundle.manifest.provenance.checkpoint
    origin = reference if isinstance(reference, Origin) else Origin(reference)
    place: str | Path
    if origin.checkpoint is None:
        place, known = cache.find_source(wanted)
    else:
        place, known = origin.checkpoint, cache.companions_of(wanted)
    checkpoint = open_checkpoint(place, companions=_completed(origin.companions, known), memo=cache.memo)
    if checkpoint.digest != wanted:
        raise _another(bundle, checkpoint, place)
    return checkpoint


def _completed(given: Companions, known: Companions) -> Companions:
    """`given`, and what it leaves out as it was when this machine converted the checkpoint."""
    stated = {
        field.name: getattr(given, field.name)
        for field in fields(Companions)
        if getattr(given, field.name) != getattr(ALONE, field.name)
    }
    return replace(known, **stated)


def _another(bundle: Bundle, checkpoint: Checkpoint, place: str | Path) -> CheckpointError:
    """The error that says how `checkpoint` differs from what the manifest says."""
    provenance = bundle.manifest.provenance
    lines = [
        f"{place} is not the checkpoint that {bundle.path} was made from: its digest is {checkpoint.digest[:12]}, "
        f"the manifest says {provenance.checkpoint[:12]}"
    ]
    options: list[str] = []
    then = [(each.sha256, each.scale) for each in provenance.adapters]
    now = [(checkpoint.sources[each.place], each.scale) for each in checkpoint.adapters]
    if then != now:
        told = (f"{each.file} at {each.scale:g} (sha256 {each.sha256[:12]})" for each in provenance.adapters)
        lines.append(f"  adapters merged then: {', '.join(told) or 'none'}")
        given = (
            f"{each.label} at {each.scale:g} (sha256 {checkpoint.sources[each.place][:12]})"
            for each in checkpoint.adapters
        )
        lines.append(f"  adapters given now: {', '.join(given) or 'none'}")
        options += [f"--adapter {each.file}:{each.scale:g}" for each in provenance.adapters]
    found = set(checkpoint.sources.values())
    for entry in provenance.sources:
        if entry.sha256 in found or entry.file.startswith("adapters/"):
            continue
        lines.append(f"  {_what_happened(entry, checkpoint)}")
        option = next((option for start, option in _OPTIONS.items() if entry.file.startswith(start)), "")
        if option:
            options.append(f"{option} PATH")
    if options:
        hint = f"give the options of the conversion too: {' '.join(dict.fromkeys(options))}"
    else:
        hint = "name the right one with --reference (and --ema, --prediction or --config as then), or convert this one"
    return CheckpointError("\n".join(lines), hint=hint)


def _what_happened(entry: SourceEntry, checkpoint: Checkpoint) -> str:
    if entry.file in checkpoint.sources:
        return (
            f"{entry.file} has another content (sha256 {checkpoint.sources[entry.file][:12]}, not {entry.sha256[:12]})"
        )
    return f"{entry.file} (sha256 {entry.sha256[:12]}) is missing"
