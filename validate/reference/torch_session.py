"""PyTorch behind the protocol of every runtime: one component, in float32 on the CPU, weights rounded as a plan says.

torch is imported inside the functions only.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...export import contract, modules
from ...quantize.codes_file import QuantizedWeights
from ...quantize.plan import Plan
from ...quantize.stored_weights import StoredWeights
from ...runtimes.protocol import Array, Closing, Feeds
from ...stages.artifacts import ComponentSource, TensorSpec

if TYPE_CHECKING:
    from torch import nn

_AS_TRAINED: Final = Plan("fp32")
_LEAST_THREADS: Final = 2


@dataclass(frozen=True, slots=True)
class TorchModel:
    """A component as PyTorch runs it, its weights rounded as a plan says; the argument of `open_reference`."""

    source: ComponentSource
    size: tuple[int, int]  # height, width in pixels
    plan: Plan = _AS_TRAINED
    quantized: QuantizedWeights | None = None  # the codes, where the plan has any


class TorchSession(Closing):
    """A component behind the protocol of every runtime."""

    def __init__(self, model: TorchModel) -> None:
        self.inputs: tuple[TensorSpec, ...] = contract.input_specs(model.source, model.size)
        self.outputs: tuple[TensorSpec, ...] = contract.output_specs(model.source, model.size)
        self._module: nn.Module | None = modules.load(model.source)
        if model.plan != _AS_TRAINED:
            round_weights(self._module, StoredWeights(model.source, model.plan, model.quantized))

    @property
    def module(self) -> nn.Module:
        if self._module is None:
            raise RuntimeError("the session is closed")
        return self._module

    def run(self, feeds: Feeds) -> dict[str, Array]:
        import torch

        with torch.inference_mode():
            # a copy: torch refuses to promise anything about arrays that are read-only
            result = self.module(*(torch.from_numpy(np.array(feeds[spec.name])) for spec in self.inputs))
        results = result if isinstance(result, tuple) else (result,)
        return {spec.name: value.numpy() for spec, value in zip(self.outputs, results, strict=True)}

    def close(self) -> None:
        self._module = None
        gc.collect()  # modules hold reference cycles; gigabytes must not wait for the collector


def open_reference(argument: Any, threads: int) -> TorchSession:
    """Opener for `runtimes.isolation.open_isolated`: loads a `TorchModel`, or its fields, in this process."""
    import torch
    from pydantic import TypeAdapter

    torch.set_num_threads(threads)
    return TorchSession(TypeAdapter(TorchModel).validate_python(argument))


def settle_threads() -> None:
    """Let PyTorch use two threads or more, so that the reference is the same wherever it runs.

    With one thread oneDNN multiplies 1x1 convolutions in another order than with several; from 2 to 16 threads every
    kernel of these models was seen to give equal bits.
    """
    import torch

    torch.set_num_threads(max(_LEAST_THREADS, torch.get_num_threads()))


def round_weights(module: nn.Module, stored: StoredWeights) -> None:
    """Give the wrapped `module` (from `modules.load`) the values that `stored` computes with, in place.

    Raises:
        ModelError: a weight that is to be float16 exceeds its largest value, 65504.
    """
    import torch

    bare: Any = module.m
    with torch.no_grad():
        for name in stored.names():
            if stored.is_rounded(name):
                bare.get_parameter(name).copy_(torch.from_numpy(stored.read(name)))
