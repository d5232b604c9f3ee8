"""ncnn models of the embedded demo checkpoint for tests: built in this process, each once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from diffusette.export import contract, modules
from diffusette.quantize.plan import Plan
from diffusette.quantize.quantized import quantized_weights
from diffusette.runtimes.inputs import native_feeds, time_embedding_facts
from diffusette.runtimes.ncnn.lower import native_inputs
from diffusette.runtimes.ncnn.session import NcnnSession
from diffusette.runtimes.ncnn.target import NcnnTarget
from diffusette.runtimes.ncnn.trace import TracedNcnn, trace_of
from diffusette.stages.artifacts import ComponentSource, TargetModel
from diffusette.stages.stage import digest_of
from diffusette.validate.reference.torch_session import TorchModel, TorchSession
from numpy.typing import NDArray

SIZE: Final = (64, 64)
Array = NDArray[Any]


class Workshop:
    """Runs stages in this process, equal ones once a test session."""

    def __init__(self, root: Path, sources: Mapping[str, ComponentSource]) -> None:
        self.root = root
        self.sources = sources
        self._done: dict[Path, Any] = {}
        self.module = cache(lambda component: modules.load(self.sources[component]))

    def run(self, stage: Any) -> Any:
        into = self.root / digest_of(stage)
        if not into.is_dir():
            into.mkdir()
            self._done[into] = dataclasses.replace(stage.run(into), digest=into.name)
        return self._done[into]

    def traced(self, component: str, size: tuple[int, int] = SIZE) -> TracedNcnn:
        traced: TracedNcnn = self.run(trace_of(self.sources[component], size))
        return traced

    def model(self, component: str, precision: str, size: tuple[int, int] = SIZE) -> TargetModel:
        return NcnnTarget().build(self.sources[component], size, Plan(precision), self.run)

    def feeds(self, component: str, size: tuple[int, int] = SIZE) -> dict[str, Array]:
        """Feeds of PyTorch's module: unit Gaussians, a timestep amid the schedule, token ids."""
        generator = np.random.default_rng(7)
        feeds: dict[str, Array] = {}
        for spec in contract.input_specs(self.sources[component], size):
            if spec.dtype == "int64":
                feeds[spec.name] = generator.integers(0, 600, spec.shape)
            elif spec.name == "timestep":
                feeds[spec.name] = np.array(481, np.float32)
            else:
                feeds[spec.name] = generator.standard_normal(spec.shape).astype(np.float32)
        return feeds

    def native(self, component: str, feeds: Mapping[str, Array], size: tuple[int, int] = SIZE) -> dict[str, Array]:
        source = self.sources[component]
        facts = time_embedding_facts(source.config) if component == "unet" else {}
        return native_feeds(feeds, native_inputs(source, size), facts)


def torch_output(module: Any, feeds: Mapping[str, Array]) -> Array:
    import torch

    with torch.no_grad():
        output: Array = module(*map(torch.from_numpy, feeds.values())).numpy()
    return output


def ncnn_output(model: TargetModel, feeds: Mapping[str, Array]) -> Array:
    with NcnnSession(model, threads=2) as session:
        (output,) = session.run(feeds).values()
    return output


def snr_db(reference: Array, candidate: Array) -> float:
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    return float(10 * np.log10((r**2).sum() / ((r - c) ** 2).sum()))


def rounded_output(
    workshop: Workshop, component: str, plan: Plan, feeds: dict[str, Array], size: tuple[int, int] = SIZE
) -> Array:
    """PyTorch with the dequantised weights of the same codes."""
    source = workshop.sources[component]
    with TorchSession(TorchModel(source, size, plan, quantized_weights(source, plan, workshop.run))) as session:
        (output,) = session.run(feeds).values()
    return output
