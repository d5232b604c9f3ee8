"""What rounding alone costs a checkpoint's pictures: PyTorch draws them with the weights that a conversion has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...quantize.codes_file import QuantizedWeights
from ...quantize.plan import Plan
from ...stages.artifacts import Checkpoint
from ...stages.stage import Stage
from ..parity import compare, finite_db
from .probes import Probes
from .pytorch import Reference
from .torch_session import TorchModel, TorchSession


@dataclass(frozen=True, slots=True)
class PictureRatios:
    """PSNR of each picture against float32 PyTorch's, in dB with peak 1.0, finite."""

    folder: Path
    psnr_db: tuple[float, ...]
    digest: str = ""


@dataclass(frozen=True)
class RoundedPictures(
    Stage[PictureRatios], name="rounded-pictures", version=1, tools=("torch", "diffusers", "transformers", "tokenizers")
):
    """Draw the pictures of `probes` again, every component with the weights of its plan."""

    checkpoint: Checkpoint
    probes: Probes
    plans: Mapping[str, Plan]
    quantized: Mapping[str, QuantizedWeights | None]  # what `quantized_weights` gives for each

    def run(self, into: Path) -> PictureRatios:
        drawn = Reference(self.checkpoint, self.probes.size, self.probes.plan, self._open).pictures(into)
        return PictureRatios(
            into,
            tuple(
                finite_db(compare(truth.image, ours.image, peak=1.0, where=f"picture of {truth.prompt!r}").psnr_db)
                for truth, ours in zip(self.probes.pictures(), drawn, strict=True)
            ),
        )

    def _open(self, component: str) -> TorchSession:
        source, size = self.checkpoint.components[component], self.probes.size
        if component not in self.plans:
            return TorchSession(TorchModel(source, size))
        return TorchSession(TorchModel(source, size, self.plans[component], self.quantized[component]))
