"""A mixture of schemes tried in PyTorch, before any runtime sees it: what it costs in answers and in pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from ...quantize.calibrated import CodePicker, RoundedLayers
from ...quantize.codes_file import QuantizedWeights
from ...quantize.plan import Plan
from ...quantize.samples import Samples
from ...stages.artifacts import Checkpoint
from ...stages.stage import Stage
from ...validate.reference.probes import ProbePlan, read_arrays
from ...validate.reference.pytorch import Reference
from ...validate.reference.torch_session import TorchModel, TorchSession

_FLIPPED: Final = 15.0
"""Decibels below the median from which a picture counts as another one: where two drawings are as likely (one of four
at 6 bits of the demo), a rounding tips it over, and the error says nothing about the size of the rounding."""


def picture_error(psnr_db: Sequence[float]) -> float:
    """Mean over pictures of the root of the mean squared error, squared; without those that flipped.

    Args:
        psnr_db: of each picture, peak 1.0.
    """
    least = median(psnr_db) - _FLIPPED
    return float(np.mean([10 ** (-db / 20) for db in psnr_db if db >= least]) ** 2)


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a mixture costs. Pictures are compared with those that the samples' prompts gave in float32."""

    folder: Path
    snr_db: Mapping[str, float]  # component -> over all its calls together, each with its weight
    psnr_db: tuple[float, ...]  # of each picture, peak 1.0; empty where none was drawn
    picture_error: float  # see there; 0.0: none drawn
    digest: str = ""

    @property
    def median_psnr_db(self) -> float | None:
        return median(self.psnr_db) if self.psnr_db else None


@dataclass(frozen=True)
class TryMixture(
    Stage[Mixture], name="try", version=3, tools=("torch", "diffusers", "transformers", "tokenizers"), aside=("form",)
):
    """Run every component of `plans` on `calls` of its samples, then draw the pictures of `picture` where it is given.

    Components without a plan stay as they are: so a component is tried alone.
    """

    checkpoint: Checkpoint
    size: tuple[int, int]
    samples: Samples
    plans: Mapping[str, Plan]
    rounded: Mapping[str, tuple[RoundedLayers, ...]]
    calls: int
    picture: ProbePlan | None = None  # the plan of the first of the samples' folders
    form: str = ""  # for people
    tuned: Mapping[str, QuantizedWeights] = field(default_factory=dict)  # by component: in place of `rounded`

    def run(self, into: Path) -> Mixture:
        found = {part: self._snr(part) for part in self.plans}
        if self.picture is None:
            return Mixture(into, found, (), 0.0)
        drawn = Reference(self.checkpoint, self.size, self.picture, self.open).pictures(into)
        pictures = [each.image for each in drawn]
        truth = [read_arrays(self.samples.folders[0] / f"picture-{i:03}.npz")["image"] for i in range(len(pictures))]
        errors = [max(float(((a - b) ** 2).mean()), 1e-20) for a, b in zip(pictures, truth, strict=True)]
        psnr = tuple(float(-10 * np.log10(error)) for error in errors)
        return Mixture(into, found, psnr, picture_error(psnr))

    def _snr(self, component: str) -> float:
        signal = noise = 0.0
        with self.open(component) as session:
            for file in self.samples.files(component, self.calls):
                arrays = read_arrays(file)
                feeds = {n.removeprefix("feed."): a for n, a in arrays.items() if n.startswith("feed.")}
                weight = self.samples.weight(feeds)
                for name, value in session.run(feeds).items():
                    truth = arrays[f"output.{name}"].astype(np.float64)
                    signal += weight * float((truth**2).sum())
                    noise += weight * float(((truth - value) ** 2).sum())
        return float(10 * np.log10(signal / noise)) if noise else 999.0

    def open(self, component: str) -> TorchSession:
        """The component with the weights of its plan."""
        import torch

        source = self.checkpoint.components[component]
        if component in self.tuned:
            return TorchSession(TorchModel(source, self.size, self.plans[component], self.tuned[component]))
        session = TorchSession(TorchModel(source, self.size))
        if component not in self.plans:
            return session
        plan, picker = self.plans[component], CodePicker(source, self.rounded[component])
        module: Any = session.module.m
        with torch.no_grad():
            for name in picker.names():
                weight = module.get_parameter(name)
                scheme = plan.scheme(name, tuple(weight.shape))
                if scheme.is_half and weight.dim() > 1:
                    weight.copy_(weight.half())
                elif not scheme.is_float:
                    weight.copy_(torch.from_numpy(picker.codes(name, scheme).dequantised()))
        return session
