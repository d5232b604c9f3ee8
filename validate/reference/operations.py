"""How many operations a call of a component takes: what a forecast of an emulated run is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...checkpoints import network
from ...export import contract, modules
from ...stages.artifacts import ComponentSource
from ...stages.stage import Stage


@dataclass(frozen=True, slots=True)
class Operations:
    """Multiplications and additions of one call, in matrix products, convolutions and attention."""

    folder: Path
    count: int
    digest: str = ""


@dataclass(frozen=True)
class CountOperations(Stage[Operations], name="operations", version=1, tools=("torch", "diffusers", "transformers")):
    """Let PyTorch count the operations of one call at `size`, (height, width) in pixels; no weight is read."""

    source: ComponentSource
    size: tuple[int, int]

    def key(self) -> Mapping[str, object]:
        return {"component": self.source.component, "config": dict(self.source.config), "size": self.size}

    def run(self, into: Path) -> Operations:
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        module = modules.wrap(self.source, network.build(self.source)).to("meta")
        specs = contract.input_specs(self.source, self.size)
        feeds = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in specs]
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            module(*feeds)
        return Operations(into, counter.get_total_flops())
