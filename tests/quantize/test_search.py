"""Allocation of bits: optimal on the hull, within the budget, and monotonic."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from diffusette.quantize.losses import LossTable, Option, bits_only, corrected
from diffusette.quantize.search import Chosen, frontier, hull, until, within

SHAPES = {"unet": {"a.weight": (8, 64), "b.weight": (8, 4), "b.bias": (8,)}}


def table() -> LossTable:
    """Three layers whose importance differs by orders of magnitude."""
    options = {
        "unet": {
            "loud": (Option("w4", 400, 1.0), Option("w4g", 450, 0.5), Option("w8", 800, 1e-3)),
            "quiet": (Option("w4", 400, 1e-4), Option("w4g", 450, 9e-5), Option("w8", 800, 1e-6)),
        },
        "vae": {"only": (Option("w4", 200, 0.1), Option("w8", 400, 1e-3))},
    }
    return LossTable(options, {"unet": 32, "vae": 0}, {"unet": 200, "vae": 50})


def loss(of: LossTable, chosen: Chosen) -> float:
    return sum(of.loss(part, chosen[part]) for part in chosen)


def test_the_hull_leaves_out_what_no_price_of_a_bit_would_buy() -> None:
    good = (Option("a", 4, 1.0), Option("b", 8, 0.1))
    assert hull((*good, Option("above the line", 6, 0.9), Option("dearer and worse", 9, 0.2))) == list(good)


def every_choice(whole: LossTable) -> list[Chosen]:
    places = [(part, name, options) for part, each in whole.options.items() for name, options in each.items()]
    found = []
    for pick in product(*(options for _, _, options in places)):
        chosen: Chosen = {part: {} for part in whole.options}
        for (part, name, _), option in zip(places, pick, strict=True):
            chosen[part][name] = option.scheme
        found.append(chosen)
    return found


@pytest.mark.parametrize("bits", range(1032, 2100, 67))
def test_no_choice_of_as_few_bits_is_better(bits: int) -> None:
    whole = table()
    found = within(whole, {"unet": 1.0, "vae": 1.0}, bits)
    assert found is not None
    assert whole.bits(found) <= bits
    best = min(loss(whole, choice) for choice in every_choice(whole) if whole.bits(choice) <= bits)
    assert loss(whole, found) == pytest.approx(best)


def test_a_budget_coarser_than_its_resolution_is_still_kept() -> None:
    options = {f"{i}": (Option("w4", 10**6 + i, 1.0 / (i + 1)), Option("w8", 2 * 10**6 + i, 0.0)) for i in range(50)}
    large = LossTable({"unet": options}, {"unet": 7}, {"unet": 50})
    for bits in (60 * 10**6, 75_123_456, 99 * 10**6):
        found = within(large, {"unet": 1.0}, bits)
        assert found is not None
        assert bits - 2 * 10**6 < large.bits(found) <= bits
        assert found["unet"]["0"] == "w8"  # the most important first


def test_steps_are_optimal_where_they_end() -> None:
    whole = table()
    chosen, steps = frontier(whole, {"unet": 1.0, "vae": 1.0})
    for step in steps:
        chosen[step.component][step.parameter] = step.scheme
        best = min(loss(whole, choice) for choice in every_choice(whole) if whole.bits(choice) <= whole.bits(chosen))
        assert loss(whole, chosen) == pytest.approx(best)


def test_more_bits_never_lose_more() -> None:
    whole = table()
    losses = [loss(whole, within(whole, {"unet": 1.0, "vae": 1.0}, bits) or {}) for bits in range(1032, 2100, 50)]
    assert all(after <= before for before, after in pairwise(losses))


def test_a_budget_below_the_cheapest_choice_has_no_answer() -> None:
    assert within(table(), {"unet": 1.0, "vae": 1.0}, 1031) is None


def test_until_stops_at_the_first_that_is_enough() -> None:
    whole = table()
    found = until(whole, {"unet": 1.0, "vae": 1.0}, lambda c: whole.loss("unet", c["unet"]) < 0.1)
    assert found is not None
    assert found["unet"] == {"loud": "w8", "quiet": "w4"}
    assert until(whole, {"unet": 1.0, "vae": 1.0}, lambda c: False) is None


def test_bits_include_scales_biases_and_rows_too_short_for_groups() -> None:
    found = bits_only(SHAPES, ("w4g32_afp", "w8c_afp"))
    assert found.fixed_bits == {"unet": 8 * 32}
    assert {o.scheme: o.bits for o in found.options["unet"]["a.weight"]} == {
        "w4g32_afp": 8 * (64 * 4 + 2 * 32),
        "w8c_afp": 8 * (64 * 8 + 32),
    }
    assert [o.scheme for o in found.options["unet"]["b.weight"]] == ["w8c_afp"]
    cheapest, _ = frontier(found, {"unet": 1.0})
    assert found.bits(cheapest) == 8 * 32 + 8 * (64 * 4 + 64) + 8 * (4 * 8 + 32)


def test_trials_correct_estimates_of_their_own_layer_and_of_its_kind() -> None:
    estimated = {
        "x.0.to_k.weight": {"w4": 1e-3, "w8": 1e-5},
        "x.1.to_k.weight": {"w4": 1e-4, "w8": 1e-6},
        "x.conv.weight": {"w4": 1.0, "w8": 0.1},
    }
    tried = {"x.0.to_k.weight": 1e-2, "x.conv.weight": 0.5}
    found = corrected(estimated, tried, dict.fromkeys(estimated, "w4"))
    assert found["x.0.to_k.weight"]["w8"] == pytest.approx(1e-4)
    assert found["x.1.to_k.weight"]["w4"] == pytest.approx(1e-3)  # ten times, as the other to_k
    assert found["x.conv.weight"]["w8"] == pytest.approx(0.05)
