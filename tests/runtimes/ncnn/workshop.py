"""ncnn models of a checkpoint for tests, and what they and PyTorch compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusette.quantize.plan import Plan
from diffusette.quantize.quantized import quantized_weights
from diffusette.runtimes.inputs import native_feeds
from diffusette.runtimes.ncnn.lower import native_inputs
from diffusette.runtimes.ncnn.session import NcnnSession
from diffusette.runtimes.ncnn.target import NcnnTarget
from diffusette.runtimes.ncnn.trace import TracedNcnn, trace_of
from diffusette.stages.artifacts import TargetModel
from diffusette.validate.reference.torch_session import TorchModel, TorchSession

from ..workshop import SIZE, Array, snr_db
from ..workshop import Workshop as Shop

__all__ = ["SIZE", "Array", "Workshop", "ncnn_output", "rounded_output", "snr_db", "torch_output"]


class Workshop(Shop):
    """Of ncnn."""

    def traced(self, component: str, size: tuple[int, int] = SIZE) -> TracedNcnn:
        traced: TracedNcnn = self.run(trace_of(self.sources[component], size))
        return traced

    def model(self, component: str, precision: str, size: tuple[int, int] = SIZE) -> TargetModel:
        return self.build(NcnnTarget(), component, precision, size)

    def native(self, component: str, feeds: Mapping[str, Array], size: tuple[int, int] = SIZE) -> dict[str, Array]:
        return native_feeds(feeds, native_inputs(self.sources[component], size), self.facts(component))


def torch_output(module: Any, feeds: Mapping[str, Array]) -> Array:
    import torch

    with torch.no_grad():
        output: Array = module(*map(torch.from_numpy, feeds.values())).numpy()
    return output


def ncnn_output(model: TargetModel, feeds: Mapping[str, Array]) -> Array:
    with NcnnSession(model, threads=2) as session:
        (output,) = session.run(feeds).values()
    return output


def rounded_output(
    workshop: Workshop, component: str, plan: Plan, feeds: dict[str, Array], size: tuple[int, int] = SIZE
) -> Array:
    """PyTorch with the dequantised weights of the same codes."""
    source = workshop.sources[component]
    with TorchSession(TorchModel(source, size, plan, quantized_weights(source, plan, workshop.run))) as session:
        (output,) = session.run(feeds).values()
    return output
