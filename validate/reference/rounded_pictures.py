"""What rounding alone costs a checkpoint's pictures: PyTorch draws them with the weights that a conversion has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ...quantize.codes_file import QuantizedWeights
from ...quantize.plan import Plan
from ..parity import compare, finite_db
from .probes import Probes
from .pytorch import ReferenceProbes
from .torch_session import TorchModel, TorchSession


@dataclass(frozen=True, slots=True)
class PictureRatios:
    """PSNR of each picture against float32 PyTorch's, in dB with peak 1.0, finite."""

    folder: Path
    psnr_db: tuple[float, ...]
    digest: str = ""


@dataclass(frozen=True)
class RoundedPictures(ReferenceProbes):
    """Draw the pictures of `probes` again, every component with the weights of its plan.

    The inherited `plan` is that of `probes`, with nothing picked.
    """

    probes: Probes
    plans: Mapping[str, Plan]
    quantized: Mapping[str, QuantizedWeights | None]  # what `quantized_weights` gives for each

    name: ClassVar[str] = "rounded-pictures"
    version: ClassVar[int] = 1
    output: ClassVar[type] = PictureRatios

    def key(self) -> Mapping[str, object]:
        return {
            "checkpoint": self.checkpoint.digest,
            "probes": self.probes.digest,
            "plans": {part: plan.key() for part, plan in self.plans.items()},
            "quantized": {part: each.digest if each else None for part, each in self.quantized.items()},
        }

    def run(self, into: Path) -> PictureRatios:  # type: ignore[override]
        drawn = super().run(into)
        ratios = tuple(
            finite_db(compare(truth.image, ours.image, peak=1.0, where=f"picture of {truth.prompt!r}").psnr_db)
            for truth, ours in zip(self.probes.pictures(), drawn.pictures(), strict=True)
        )
        for file in into.glob("*.npz"):
            file.unlink()  # only the ratios are asked for
        return PictureRatios(into, ratios)

    def _open(self, component: str) -> TorchSession:
        if component not in self.plans:
            return super()._open(component)
        source, plan = self.checkpoint.components[component], self.plans[component]
        return TorchSession(TorchModel(source, self.size, plan, self.quantized[component]))
