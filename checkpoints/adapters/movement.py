"""How far adapters move each weight: the answer to "my LoRA had no effect"."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ...stages.artifacts import ComponentSource
from ...stages.errors import CheckpointError
from ...stages.stage import Stage
from ..weights import Weights


@dataclass(frozen=True, slots=True)
class Movement:
    """`moved.json`: parameter -> |after - before| / |before|, Euclidean; a zero weight that changes counts as 1."""

    folder: Path
    component: str
    digest: str = ""

    def read(self) -> dict[str, float]:
        found: dict[str, float] = json.loads((self.folder / "moved.json").read_text())
        return found

    def summary(self) -> str:
        """One line for people."""
        moved = self.read()
        most = max(moved, key=lambda name: moved[name])
        return (
            f"adapters moved {len(moved)} weights of {self.component} by {min(moved.values()):.2%} to "
            f"{moved[most]:.2%} (most: {most})"
        )


@dataclass(frozen=True)
class MeasureMovement(Stage[Movement], name="adapters", version=1, tools=("torch", "peft")):
    """Merge every adapted parameter of `source` once, and compare it with what it was."""

    source: ComponentSource

    def run(self, into: Path) -> Movement:
        """Measure.

        Raises:
            CheckpointError: nothing moved at all: every factor is zero, or every scale.
        """
        import numpy as np

        weights = Weights(self.source)
        moved: dict[str, float] = {}
        for name in dict.fromkeys(change.parameter for change in self.source.adapted if change.kind != "rows"):
            before = weights.read_unchanged(name).astype(np.float64)
            distance = float(np.linalg.norm(weights.read(name) - before))
            length = float(np.linalg.norm(before))
            moved[name] = distance / length if length else float(distance > 0)
        if not any(moved.values()):
            raise CheckpointError(
                f"the adapters change none of the {len(moved)} weights of {self.source.component} that they are for",
                hint="the file was saved before it was trained, or its scale is 0",
            )
        (into / "moved.json").write_text(json.dumps(moved, indent=1, sort_keys=True) + "\n")
        return Movement(into, self.source.component)
