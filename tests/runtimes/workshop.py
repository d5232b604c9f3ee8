"""Models of the embedded demo checkpoint for the tests of a runtime: built in this process, each once."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from diffusette.export import contract, modules
from diffusette.quantize.onnx_model import onnx_model
from diffusette.quantize.plan import Plan
from diffusette.runtimes.protocol import Target
from diffusette.stages.artifacts import Checkpoint, OnnxModel, TargetModel
from numpy.typing import NDArray

Array = NDArray[Any]
SIZE: Final = (64, 64)


class Workshop:
    """Runs equal stages once, in folders of their own below `root`."""

    def __init__(self, root: Path, checkpoint: Checkpoint) -> None:
        self.root = root
        self.checkpoint = checkpoint
        self._done: dict[str, Any] = {}
        self.module = cache(lambda component: modules.load(checkpoint.components[component]))
        self.reference = cache(self._reference)

    def run(self, stage: Any) -> Any:
        """A `Runner` without cache and child process."""
        if repr(stage) not in self._done:
            into = self.root / f"{len(self._done)}-{stage.name}"
            into.mkdir()
            self._done[repr(stage)] = dataclasses.replace(stage.run(into), digest=into.name)
        return self._done[repr(stage)]

    def build(self, target: Target, component: str, precision: str) -> TargetModel:
        return target.build(self.checkpoint.components[component], SIZE, Plan(precision), self.run)

    def canonical(self, component: str, precision: str) -> OnnxModel:
        return onnx_model(self.checkpoint.components[component], SIZE, Plan(precision), self.run)

    def feeds(self, component: str, seed: int = 11) -> dict[str, Array]:
        """Random feeds by PyTorch's names and dtypes."""
        generator = np.random.default_rng(seed)
        feeds: dict[str, Array] = {}
        for spec in contract.input_specs(self.checkpoint.components[component], SIZE):
            if spec.dtype == "int64":
                feeds[spec.name] = generator.integers(0, 600, spec.shape)
            elif spec.name == "timestep":
                feeds[spec.name] = np.array(481, np.float32)
            elif spec.name == "time_ids":
                feeds[spec.name] = np.array([[*SIZE, 0, 0, *SIZE]], np.float32)
            else:
                feeds[spec.name] = generator.standard_normal(spec.shape, dtype=np.float32)
        return feeds

    def _reference(self, component: str, weights: str = "float32") -> Array:
        """What PyTorch computes from `feeds(component)`, with its weights rounded to `weights` and back."""
        import copy

        import torch

        module = copy.deepcopy(self.module(component))
        if weights != "float32":
            for parameter in module.parameters():
                if parameter.ndim >= 2:
                    parameter.data = parameter.data.to(getattr(torch, weights)).float()
        with torch.inference_mode():
            output: Array = module(*(torch.from_numpy(a) for a in self.feeds(component).values())).numpy()
        return output


def snr_db(reference: Array, candidate: Array) -> float:
    """10 log10(Σr² / Σ(r-c)²)."""
    wide = reference.astype(np.float64)
    noise = float(np.sum((wide - candidate) ** 2))
    return float("inf") if noise == 0 else float(10 * np.log10(np.sum(wide**2) / noise))
