"""Bits for each layer: the least loss under a budget, or the least bits for a loss.

Every parameter's options are cut to their lower convex hull over (bits, loss). Then taking the hulls' steps in the
order of loss saved a bit is optimal for every budget that ends with a step ("Efficient bit allocation for an arbitrary
set of quantizers", Shoham and Gersho, 1988): one sorted list is the frontier. For budgets between, see `within`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from .losses import LossTable, Option

_CELLS: Final = 2**16  # a budget's resolution; bits of a layer are rounded up to it, so that a sum never exceeds it

Chosen = dict[str, dict[str, str]]
"""Component -> parameter -> scheme."""


@dataclass(frozen=True, slots=True)
class Step:
    """Raise one parameter to a better scheme."""

    component: str
    parameter: str
    scheme: str
    bits: int  # that it adds
    saved: float  # weighted loss that it takes away


def hull(options: tuple[Option, ...]) -> list[Option]:
    """The options that are best for some price of a bit, fewest bits first; each next saves less a bit."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bits, o.loss)):
        if kept and option.loss >= kept[-1].loss:
            continue
        while len(kept) > 1 and _slope(kept[-2], option) >= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(option)
    return kept


def _slope(a: Option, b: Option) -> float:
    return (a.loss - b.loss) / (b.bits - a.bits)


def frontier(table: LossTable, weights: Mapping[str, float]) -> tuple[Chosen, list[Step]]:
    """The cheapest choice, and the steps from it, the best a bit first.

    Args:
        weights: component -> what a unit of its loss counts.
    """
    chosen: Chosen = {}
    steps = []
    for component, parameters in table.options.items():
        chosen[component] = {}
        for name, options in parameters.items():
            kept = hull(options)
            chosen[component][name] = kept[0].scheme
            for before, after in pairwise(kept):
                saved = weights[component] * (before.loss - after.loss)
                steps.append(Step(component, name, after.scheme, after.bits - before.bits, saved))
    # a parameter's own steps keep their order: on a hull each saves less a bit than the one before
    steps.sort(key=lambda step: -step.saved / step.bits)
    return chosen, steps


def within(table: LossTable, weights: Mapping[str, float], bits: int) -> Chosen | None:
    """The least loss that `bits` can buy; None when even the cheapest choice takes more.

    Steps of large layers do not fit into what is left of a budget, and the small ones that do are poor: by steps alone
    the demo's token embeddings stay at 4 bits. So it is solved as the multiple-choice knapsack that it
    is, by dynamic programming over the bits beyond the cheapest choice.
    """
    import numpy as np

    places = [(part, name, options) for part, each in table.options.items() for name, options in each.items()]
    least = [min(option.bits for option in options) for _, _, options in places]
    room = bits - sum(table.fixed_bits.values()) - sum(least)
    if room < 0:
        return None
    unit = max(1, -(-room // _CELLS))
    cells = room // unit
    best = np.zeros(cells + 1)  # least loss of the places so far, for each number of units that they may take
    taken = np.zeros((len(places), cells + 1), np.uint8)
    for row, ((part, _, options), floor) in enumerate(zip(places, least, strict=True)):
        found = np.full(cells + 1, np.inf)
        for index, option in enumerate(options):
            extra = -(-(option.bits - floor) // unit)
            if extra > cells:
                continue
            loss = best[: cells + 1 - extra] + weights[part] * option.loss
            better = loss < found[extra:]
            found[extra:][better] = loss[better]
            taken[row, extra:][better] = index
        best = found
    chosen: Chosen = {part: {} for part in table.options}
    left = cells
    for row in reversed(range(len(places))):
        part, name, options = places[row]
        option = options[taken[row, left]]
        chosen[part][name] = option.scheme
        left -= -(-(option.bits - least[row]) // unit)
    return chosen


def until(table: LossTable, weights: Mapping[str, float], enough: Callable[[Chosen], bool]) -> Chosen | None:
    """The first choice on the frontier that is `enough`; None when not even the last is."""
    chosen, steps = frontier(table, weights)
    if enough(chosen):
        return chosen
    for step in steps:
        chosen[step.component][step.parameter] = step.scheme
        if enough(chosen):
            return chosen
    return None
