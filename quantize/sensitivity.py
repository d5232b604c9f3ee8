"""What an error in each layer does to its component's output, in relative terms: error power / output power.

Two measurements, as stages. `MeasureGains` asks all layers at once: for random v over the output, the gradient of
v . out with respect to what a layer puts out tells how errors there arrive, so that

    loss(layer) = sum over output channels o of  gain[o] * E|D_o x|^2

with E|D_o x|^2 from the second moments of the inputs. It is the diagonal of the Kronecker-factored Gauss-Newton form
("Optimizing Neural Networks with Kronecker-factored Approximate Curvature", Martens and Grosse, 2015), and takes
errors at different positions to be independent. They are not where a layer feeds attention, and the estimate is then
too low by up to 15 times; so `TryLayers` really rounds layers, one at a time, and corrects it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.safetensors_file import read_header, read_tensor
from ..stages.artifacts import ComponentSource
from ..stages.errors import ModelError
from ..stages.stage import Stage
from .calibrated import CodePicker, RoundedLayers, bare, stored_schemes
from .samples import Samples

if TYPE_CHECKING:
    from torch import Tensor

_GAINS: Final = "gains.safetensors"
_SEED: Final = 0


@dataclass(frozen=True, slots=True)
class Gains:
    """`gains.safetensors`: PARAMETER -> [O], relative output error for each unit of E|D_o x|^2."""

    folder: Path
    component: str
    digest: str = ""

    def read(self) -> dict[str, NDArray[np.float64]]:
        stored = read_header(self.folder / _GAINS)
        return {name: read_tensor(tensor).astype(np.float64) for name, tensor in stored.items()}


@dataclass(frozen=True)
class MeasureGains(Stage[Gains], name="sensitivity", version=1, tools=("torch", "diffusers", "transformers")):
    """One backward pass for each of `calls` samples; blocks are recomputed rather than kept, to bound memory."""

    source: ComponentSource
    samples: Samples
    calls: int

    def run(self, into: Path) -> Gains:
        import torch
        from safetensors.numpy import save_file

        from ..export import modules
        from .moments import run_once

        wrapped = modules.load(self.source)
        module: Any = bare(wrapped)
        if getattr(module, "_supports_gradient_checkpointing", False) and hasattr(
            module, "enable_gradient_checkpointing"
        ):
            module.enable_gradient_checkpointing()
        chance = torch.Generator().manual_seed(_SEED)
        gains: dict[str, Tensor] = {}
        power = 0.0
        handles = _watch_gradients(module, gains)
        for feeds in self.samples.feeds(self.source.component, self.calls):
            with torch.enable_grad():
                out = run_once(wrapped, feeds)
                weight = self.samples.weight(feeds)
                direction = torch.randn(out.shape, generator=chance) * (weight / out.numel()) ** 0.5
                (out * direction).sum().backward()
            power += weight * float((out.detach() ** 2).mean())
        for handle in handles:
            handle.remove()
        if not power > 0:
            raise ModelError(f"{self.source.component} answers its calibration samples with nothing but zeros")
        # sums over calls both: mean gain / mean power
        save_file({name: (total / power).double().numpy() for name, total in gains.items()}, into / _GAINS)
        return Gains(into, self.source.component)


def _watch_gradients(module: Any, gains: dict[str, Any]) -> list[Any]:
    """Add up, for each weight, the squared gradients of what its layer puts out: [O]."""
    from torch import nn

    def hook(parameter: str) -> Any:
        def keep(gradient: Any) -> None:
            squares = gradient.detach() ** 2
            # channels are last but for convolutions
            total = squares.sum((0, 2, 3)) if squares.dim() == 4 else squares.flatten(0, -2).sum(0)
            gains[parameter] = gains.get(parameter, 0) + total

        def watch(layer: Any, inputs: Any, out: Any) -> Any:
            if not out.requires_grad:
                out.requires_grad_(True)  # the first of its path: weights themselves want no gradient
            out.register_hook(keep)
            return out

        return watch

    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    return [
        layer.register_forward_hook(hook(f"{path}.weight"))
        for path, layer in module.named_modules()
        if isinstance(layer, kinds) and not layer.weight.is_meta
    ]


@dataclass(frozen=True, slots=True)
class Tried:
    """PARAMETER -> relative error of the component's output with this layer rounded alone."""

    folder: Path
    component: str
    losses: Mapping[str, float]
    digest: str = ""


@dataclass(frozen=True)
class TryLayers(Stage[Tried], name="try-layers", version=1, tools=("torch", "diffusers", "transformers")):
    """Round `parameters` at `scheme`, one at a time, and run the component on `calls` samples."""

    source: ComponentSource
    samples: Samples
    rounded: tuple[RoundedLayers, ...]
    parameters: tuple[str, ...]
    scheme: str
    calls: int

    def run(self, into: Path) -> Tried:
        import torch

        from ..export import modules
        from .moments import run_once

        wrapped = modules.load(self.source)
        picker = CodePicker(self.source, self.rounded)
        feeds = list(self.samples.feeds(self.source.component, self.calls))
        weights = [self.samples.weight(each) for each in feeds]
        losses = {}

        def power(outs: Iterable[Tensor]) -> float:
            return sum(w * float((out**2).sum()) for w, out in zip(weights, outs, strict=True))

        with torch.no_grad():
            truth = [run_once(wrapped, each) for each in feeds]
            whole = power(truth)
            for parameter in self.parameters:
                weight: Any = bare(wrapped).get_parameter(parameter)
                (scheme,) = stored_schemes(parameter, tuple(weight.shape), (self.scheme,))
                kept = weight.clone()
                weight.copy_(torch.from_numpy(picker.codes(parameter, scheme).dequantised()))
                found = [run_once(wrapped, each) for each in feeds]
                weight.copy_(kept)
                losses[parameter] = power(a - b for a, b in zip(found, truth, strict=True)) / whole
        return Tried(into, self.source.component, losses)
