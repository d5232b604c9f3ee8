"""The largest activation of every module along the gate's trajectories, in PyTorch's float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...quantize.islands import Peaks, write_peaks
from ...stages.artifacts import ComponentSource
from ...stages.stage import Stage
from .probes import Probes
from .torch_session import TorchModel, TorchSession


@dataclass(frozen=True)
class ScanActivations(Stage[Peaks], name="scan-activations", version=1, tools=("torch", "diffusers", "transformers")):
    """Run the probes through PyTorch and keep, of each module without children, the peak of its output."""

    source: ComponentSource
    probes: Probes

    def run(self, into: Path) -> Peaks:
        peaks: dict[str, float] = {}

        def watch(name: str) -> Any:
            def note(module: Any, inputs: Any, output: Any) -> None:
                if getattr(output, "is_floating_point", bool)():
                    peaks[name] = max(peaks.get(name, 0.0), float(output.abs().max()))

            return note

        with TorchSession(TorchModel(self.source, self.probes.size)) as session:
            bare: Any = session.module.m
            for name, module in bare.named_modules():
                if not any(True for _ in module.children()):
                    module.register_forward_hook(watch(name))
            for probe in self.probes.read(self.source.component):
                session.run(probe.feeds)
        write_peaks(peaks, into)
        return Peaks(into, self.source.component)
