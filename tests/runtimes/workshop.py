"""Models of a checkpoint for the tests of a runtime: built in this process, each once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from diffusette.export import contract, modules
from diffusette.quantize.onnx_model import onnx_model
from diffusette.quantize.plan import Plan
from diffusette.runtimes.inputs import time_embedding_facts
from diffusette.runtimes.protocol import Target
from diffusette.stages.artifacts import ComponentSource, OnnxModel, TargetModel
from diffusette.stages.stage import digest_of
from diffusette.validate.parity import compare
from numpy.typing import NDArray

Array = NDArray[Any]
SIZE: Final = (64, 64)


class Workshop:
    """Runs equal stages once, in folders of their own below `root`."""

    def __init__(self, root: Path, sources: Mapping[str, ComponentSource]) -> None:
        self.root = root
        self.sources = sources
        self.done: dict[str, Any] = {}
        self.module = cache(lambda component: modules.load(sources[component]))
        self.reference = cache(self._reference)

    def run(self, stage: Any) -> Any:
        """A `Runner` without cache and child process."""
        key = digest_of(stage)
        if key not in self.done:
            self.done[key] = self.run_again(stage)
        return self.done[key]

    def run_again(self, stage: Any) -> Any:
        into = self.root / f"{len(list(self.root.iterdir()))}-{stage.name}"
        into.mkdir()
        return dataclasses.replace(stage.run(into), digest=into.name)

    def build(self, target: Target, component: str, precision: str, size: tuple[int, int] = SIZE) -> TargetModel:
        return target.build(self.sources[component], size, Plan(precision), self.run)

    def canonical(self, component: str, precision: str) -> OnnxModel:
        return onnx_model(self.sources[component], SIZE, Plan(precision), self.run)

    def feeds(self, component: str, size: tuple[int, int] = SIZE, seed: int = 11) -> dict[str, Array]:
        """Random feeds by PyTorch's names and dtypes: unit Gaussians, a timestep amid the schedule, token ids."""
        generator = np.random.default_rng(seed)
        feeds: dict[str, Array] = {}
        for spec in contract.input_specs(self.sources[component], size):
            if spec.dtype == "int64":
                feeds[spec.name] = generator.integers(0, 600, spec.shape)
            elif spec.name == "timestep":
                feeds[spec.name] = np.array(481, np.float32)
            elif spec.name == "time_ids":
                feeds[spec.name] = np.array([[*size, 0, 0, *size]], np.float32)
            else:
                feeds[spec.name] = generator.standard_normal(spec.shape, dtype=np.float32)
        return feeds

    def facts(self, component: str) -> Mapping[str, Any]:
        """`time_embedding_facts` of a UNet; nothing of others."""
        return time_embedding_facts(self.sources[component].config) if component == "unet" else {}

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
    """10 log10(Σr² / Σ(r-c)²), as every gate computes it."""
    return compare(reference, candidate, where="test").snr_db
