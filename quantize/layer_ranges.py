"""The ranges over which a component's activations are rounded, as a file that targets read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

Side = Literal["input", "output"]
Range = tuple[float, float]

FILE: Final = "ranges.json"


@dataclass(frozen=True, slots=True)
class LayerRanges:
    """`ranges.json`: module path -> `input` (and `output` of a convolution) -> [low, high], and who chose it."""

    folder: Path
    component: str
    method: str
    digest: str = ""

    def read(self, side: Side = "input") -> dict[str, Range]:
        """Module path -> the range of its input or output; without layers that nothing ran through."""
        stored = json.loads((self.folder / FILE).read_bytes())
        return {path: (entry[side][0], entry[side][1]) for path, entry in stored.items() if side in entry}
