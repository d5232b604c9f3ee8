"""One quantization for every runtime: codes and scales of a component, written tensor by tensor.

Targets pack these codes in their own format, and PyTorch's rounded reference computes with the very same values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..checkpoints.weights import Weights
from ..stages.artifacts import ComponentSource
from ..stages.stage import Runner, Stage
from .codes import round_to_nearest
from .codes_file import FILE, QuantizedWeights, tensors_of, write_codes
from .plan import Plan


@dataclass(frozen=True)
class QuantizeWeights(Stage[QuantizedWeights], name="quantize", version=1, tools=("numpy",)):
    """Round a component's weights to the codes of `plan`; one tensor is in memory at a time."""

    source: ComponentSource
    plan: Plan

    def run(self, into: Path) -> QuantizedWeights:
        weights = Weights(self.source)
        schemes = {name: self.plan.scheme(name, weights.spec(name)[1]) for name in weights.names()}
        coded = {name: scheme for name, scheme in schemes.items() if not scheme.is_float}
        shapes = {name: weights.spec(name)[1] for name in coded}

        def tensors() -> Iterator[NDArray[Any]]:
            for name, scheme in coded.items():
                yield from tensors_of(round_to_nearest(weights.read(name), scheme, f"{self.source.component}/{name}"))

        write_codes(into / FILE, {name: (shapes[name], coded[name]) for name in coded}, tensors())
        return QuantizedWeights(into, self.source.component)


def quantized_weights(source: ComponentSource, plan: Plan, run: Runner) -> QuantizedWeights | None:
    """The codes of `source` at `plan`, from the cache or fresh; None for a plan of floats."""
    if plan.is_float:
        return None
    if plan.samples is None:
        return run(QuantizeWeights(source, plan))
    if plan.tuned:
        from .tuning import tuned_weights

        return tuned_weights(source, plan, run).weights
    from .calibrated import calibrated_weights

    return calibrated_weights(source, plan, plan.samples, run)
