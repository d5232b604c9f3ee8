"""The table that a search works on: what each parameter costs, in bits and in error, at each scheme."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import exp, log, prod
from statistics import median
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.weights import Weights
from ..stages.artifacts import ComponentSource
from .calibrated import CodePicker, RoundedLayers, stored_schemes
from .plan import Plan, Shapes, can_be_coded
from .scheme import parse_scheme
from .sensitivity import Gains

_TINY: Final = 1e-30
_HALF: Final = parse_scheme("fp16")  # for the few layers that 8 bits would limit
_TRUST: Final = 100.0  # a measured loss corrects the estimate at most so many times either way


@dataclass(frozen=True, slots=True)
class Option:
    """One scheme for one parameter."""

    scheme: str
    bits: int  # scales included
    loss: float  # relative error of the component's output, from this parameter alone


@dataclass(frozen=True, slots=True)
class LossTable:
    """Component -> parameter -> its options; and bits that no choice changes: biases, norms, position embeddings."""

    options: Mapping[str, Mapping[str, tuple[Option, ...]]]
    fixed_bits: Mapping[str, int]
    numbers: Mapping[str, int]  # parameters of each component

    @property
    def total(self) -> int:
        """Parameters of all components."""
        return sum(self.numbers.values())

    def loss(self, component: str, chosen: Mapping[str, str]) -> float:
        """Predicted relative error of a component's output: losses of layers add up, as independent errors do."""
        return sum(
            next(option.loss for option in options if option.scheme == chosen[parameter])
            for parameter, options in self.options[component].items()
        )

    def most_bits(self) -> int:
        """Bits of all components with every parameter at its dearest option."""
        dearest = (max(o.bits for o in options) for table in self.options.values() for options in table.values())
        return sum(self.fixed_bits.values()) + sum(dearest)

    def bits(self, chosen: Mapping[str, Mapping[str, str]]) -> int:
        """Bits of all components."""
        return sum(self.fixed_bits.values()) + sum(
            next(option.bits for option in options if option.scheme == chosen[component][parameter])
            for component, table in self.options.items()
            for parameter, options in table.items()
        )


def bits_only(shapes: Mapping[str, Shapes], schemes: tuple[str, ...]) -> LossTable:
    """The table before anything was measured: all losses are 0. Enough to know what sizes can be had."""
    options, fixed, numbers = {}, {}, {}
    for component, parameters in shapes.items():
        table = {}
        for name, shape in parameters.items():
            if can_be_coded(name, shape):
                found = [*stored_schemes(name, tuple(shape), schemes), *([_HALF] if _HALF.name in schemes else [])]
                table[name] = tuple(Option(scheme.name, scheme.bits(shape), 0.0) for scheme in found)
        fixed[component] = sum(
            Plan("fp32").scheme(name, shape).bits(shape) for name, shape in parameters.items() if name not in table
        )
        options[component] = table
        numbers[component] = sum(prod(shape) for shape in parameters.values())
    return LossTable(options, fixed, numbers)


def estimates(
    source: ComponentSource, rounded: tuple[RoundedLayers, ...], gains: Gains, schemes: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Parameter -> scheme -> estimated loss, from second moments and gains."""
    weights, picker, gain = Weights(source), CodePicker(source, rounded), gains.read()
    found: dict[str, dict[str, float]] = {}
    for name in weights.names():
        shape = weights.spec(name)[1]
        if not can_be_coded(name, shape):
            continue
        arrivals = gain.get(name)
        found[name] = {}
        for scheme in stored_schemes(name, shape, schemes):
            if arrivals is None:  # a layer that no sample runs through, such as an unused projection
                loss = 0.0
            elif picker.is_layer(name):
                loss = float(arrivals @ picker.errors(name, scheme))
            else:  # rows of an embedding: any of them may be looked up
                miss = picker.codes(name, scheme).dequantised() - weights.read(name).astype(np.float32)
                loss = float(arrivals @ (miss.astype(np.float64) ** 2).mean(0))
            found[name][scheme.name] = max(loss, _TINY)
        if _HALF.name in schemes:
            finest = max(stored_schemes(name, shape, schemes), key=lambda scheme: scheme.weight_bits)
            values = weights.read(name).astype(np.float32)
            coarse = picker.codes(name, finest).dequantised() - values
            # errors of both are close to white, so their powers are as their losses
            share = _power(values.astype(np.float16).astype(np.float32) - values) / max(_power(coarse), _TINY)
            found[name][_HALF.name] = max(found[name][finest.name] * min(share, 1.0), _TINY)
    return found


def _power(values: NDArray[np.float32]) -> float:
    return float((values.astype(np.float64) ** 2).sum())


def corrected(
    estimated: Mapping[str, Mapping[str, float]], tried: Mapping[str, float], scheme_of: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """`estimated` with each parameter scaled to what was measured, the rest by the median correction of their kind.

    Args:
        tried: parameter -> measured loss at `scheme_of[parameter]`.
    """
    ratios = {
        name: log(min(max(max(loss, _TINY) / estimated[name][scheme_of[name]], 1 / _TRUST), _TRUST))
        for name, loss in tried.items()
    }
    kinds: dict[str, list[float]] = {}
    for name, ratio in ratios.items():
        kinds.setdefault(_kind(name), []).append(ratio)
    overall = median(ratios.values()) if ratios else 0.0

    def factor(name: str) -> float:
        same = kinds.get(_kind(name))
        return exp(ratios.get(name, median(same) if same else overall))

    return {name: {s: loss * factor(name) for s, loss in losses.items()} for name, losses in estimated.items()}


def _kind(parameter: str) -> str:
    """`to_k` of `mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight`: the last word that is no number."""
    words = [word for word in parameter.split(".")[:-1] if not word.isdigit()]
    return words[-1] if words else parameter


def with_losses(table: LossTable, losses: Mapping[str, Mapping[str, Mapping[str, float]]]) -> LossTable:
    """`table` with the losses of component -> parameter -> scheme."""
    options = {
        component: {
            name: tuple(Option(o.scheme, o.bits, losses[component][name][o.scheme]) for o in each)
            for name, each in parameters.items()
        }
        for component, parameters in table.options.items()
    }
    return LossTable(options, table.fixed_bits, table.numbers)


def loudest(losses: Mapping[str, Mapping[str, float]], scheme_of: Mapping[str, str], count: int | None) -> list[str]:
    """The `count` parameters with the largest loss at their scheme, the largest first; None for all."""
    order: Iterable[str] = sorted(losses, key=lambda name: -losses[name][scheme_of[name]])
    return list(order)[:count]
