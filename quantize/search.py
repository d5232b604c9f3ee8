"""Bits for each layer: the least loss under a budget, or the least bits for a loss.

Every parameter's options are cut to their lower convex hull over (bits, loss). Then taking the hulls' steps in the
order of loss saved a bit is optimal for every budget that ends with a step ("Efficient bit allocation for an arbitrary
set of quantizers", Shoham and Gersho, 1988): one sorted list is the frontier. For budgets between, see `within`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from .losses import LossTable, Option

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
    the demo's token embeddings stay at 4 bits and cost 7 dB. So the choice is solved as the integer program that it is
    (multiple-choice knapsack, by HiGHS).
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    cheapest, _ = frontier(table, weights)
    if table.bits(cheapest) > bits:
        return None
    places = [(part, name, options) for part, each in table.options.items() for name, options in each.items()]
    items = [(row, option) for row, (_, _, options) in enumerate(places) for option in options]
    losses = np.array([weights[places[row][0]] * option.loss for row, option in items])
    sizes = np.array([option.bits for _, option in items], float)
    room = bits - sum(table.fixed_bits.values())
    one_each = csr_array(
        (np.ones(len(items)), ([row for row, _ in items], range(len(items)))), shape=(len(places), len(items))
    )
    result = milp(
        losses / max(losses.max(), 1e-300) * 1e6,  # HiGHS takes what is below 1e-7 for nothing
        integrality=np.ones(len(items)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None, :] / room, -np.inf, 1.0)],
        options={"mip_rel_gap": 1e-3},
    )
    if result.x is None:
        raise RuntimeError(f"the allocation was not solved: {result.message}")
    chosen: Chosen = {part: {} for part in table.options}
    for (row, option), taken in zip(items, result.x, strict=True):
        if taken > 0.5:
            part, name, _ = places[row]
            chosen[part][name] = option.scheme
    if table.bits(chosen) > bits:
        raise RuntimeError(f"the allocation takes {table.bits(chosen)} bits of {bits}")
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
