"""How a component is rounded to integer codes and 8-bit activations, and what is looked at meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal["nearest", "gptq", "tuned"]
Activations = Literal["static", "dynamic"]
Ranges = Literal["minmax", "percentile", "mse", "entropy"]


@dataclass(frozen=True, slots=True)
class Rounding:
    """What a recipe says about rounding, beside the schemes: its defaults, unless it says otherwise.

    Args:
        method: how weights are rounded to integer codes.
        activations: how they are rounded to 8 bits; None: as the target does best.
        ranges: how a static range is chosen from what was seen.
        prompts: what the model draws for calibration; None: the bundled prompts.
    """

    method: Method = "nearest"
    activations: Activations | None = None
    ranges: Ranges = "percentile"
    prompts: tuple[str, ...] | None = None
