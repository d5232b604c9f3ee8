"""What a user asks a conversion for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..stages.artifacts import ALONE, Companions
from ..stages.errors import UsageError
from .recipe import Recipe

if TYPE_CHECKING:
    from ..runtimes.machines.machine import Machine
    from .search.goal import Goal


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks for.

    Args:
        checkpoint: a diffusers folder, a single file of the original code, or "demo".
        output: the bundle's folder; with several targets, the parent of one folder a target.
        recipe: a name, a file, or a recipe that was read; None: the shipped one that fits the checkpoint.
        targets: names of runtimes; none: the recipe's, else all of them.
        precision: of every component, in place of the recipe's.
        goal: search for the bits of each layer, in place of the recipe's rules; the recipe that was found, and a plot,
            are written beside the bundle.
        size: height and width in pixels, in place of the recipe's.
        companions: what is given beside the checkpoint: a VAE, a tokenizer, configurations.
        gate: compare every model with PyTorch; a bundle that drifted is put at `OUTPUT.rejected`.
        goldens: put golden vectors into each bundle, as `[bundle] goldens = true` in a recipe does.
        overwrite: replace bundles that are already at `output`.
        ignore_forecast: start although memory or disk will not suffice.
        record_memory: put what the gates' processes took into the manifests, which are then no longer equal for equal
            inputs.
        machines: run each bundle on these before it is written, and put what they computed into its manifest.
    """

    checkpoint: str | Path
    output: str | Path
    recipe: str | Path | Recipe | None = None
    targets: tuple[str, ...] = ()
    precision: str | None = None
    goal: Goal | None = None
    size: tuple[int, int] | None = None
    companions: Companions = ALONE
    gate: bool = True
    goldens: bool = False
    overwrite: bool = False
    ignore_forecast: bool = False
    record_memory: bool = False
    machines: Sequence[Machine] = ()

    def refuse_contradictions(self) -> None:
        """Raise `UsageError` where something that needs the gates is asked for without them."""
        if self.machines and not self.gate:
            raise UsageError("--machine compares with PyTorch, as the gates do", hint="leave out --no-gate")
        if self.record_memory and not self.gate:
            raise UsageError("--record-memory needs the gates, which run the models", hint="leave out --no-gate")
