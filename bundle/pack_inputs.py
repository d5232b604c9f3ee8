"""What a bundle is made of, before any of it is copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.compiled_schedule import CompiledSchedule
from ..stages.artifacts import Checkpoint, TargetModel
from .manifest import Gate
from .manifest_arithmetic import ArithmeticEntry
from .manifest_entries import (
    AdapterEntry,
    ConditioningEntry,
    ControlEntry,
    GuidanceEntry,
    MemoryEntry,
    ParityEntry,
    SpeedEntry,
    TargetEntry,
    TimeEmbedding,
    VaeEntry,
)

if TYPE_CHECKING:
    from ..quantize.plan import Plan, Shapes

Content = Path | bytes  # a file to copy, or what to write


@dataclass(frozen=True, slots=True)
class PackInputs:
    """All that makes a bundle. Equal inputs give equal bytes."""

    checkpoint: Checkpoint
    target: TargetEntry
    models: tuple[TargetModel, ...]
    tokenizers: tuple[tuple[Path, Mapping[str, Any]], ...]  # a folder each, and what write_tokenizer told of it
    schedules: tuple[CompiledSchedule, ...]  # the default first
    guidance: GuidanceEntry
    conditioning: ConditioningEntry
    vae: VaeEntry
    time_embedding: TimeEmbedding
    size: tuple[int, int]  # height, width in pixels
    recipe: str  # verbatim
    tools: Mapping[str, str]  # distribution -> version
    gate: Gate
    plans: Mapping[str, Plan] = field(default_factory=dict)  # by component
    shapes: Mapping[str, Shapes] = field(default_factory=dict)  # of every parameter, by component
    parity: Mapping[str, ParityEntry] = field(default_factory=dict)
    speed: Mapping[str, SpeedEntry] = field(default_factory=dict)
    memory: MemoryEntry = field(default_factory=MemoryEntry)
    adapters: tuple[AdapterEntry, ...] = ()
    control: ControlEntry | None = None
    arithmetic: ArithmeticEntry | None = None
    assets: Mapping[str, Content] = field(default_factory=dict)  # by path in the bundle


def vae_entry(config: Mapping[str, Any], encoder: Mapping[str, Any] | None = None) -> VaeEntry:
    """The numbers between UNet and VAE, from the decoder's config and, where that is another model's, the encoder's.

    Stable Diffusion's configs state no shift.
    """
    encoder = config if encoder is None else encoder
    return VaeEntry(
        scaling_factor=float(config["scaling_factor"]),
        shift=float(config.get("shift_factor") or 0.0),
        encoder_scaling_factor=float(encoder["scaling_factor"]),
        encoder_shift=float(encoder.get("shift_factor") or 0.0),
        force_upcast=config.get("force_upcast") is True,
    )
