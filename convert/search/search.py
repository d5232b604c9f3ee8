"""Bits for each layer under a goal: measure what layers cost, allocate, try mixtures, and write it all down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import ceil, floor
from typing import TYPE_CHECKING, Final

from ...stages.artifacts import Checkpoint
from ...stages.errors import UnsupportedPrecision, UsageError
from ...stages.stage import Runner
from ...validate.reference.calibrate import draw_samples
from ..recipe import Recipe, parameters_of
from .goal import Found, Goal

if TYPE_CHECKING:
    from ...quantize.losses import LossTable
    from ...quantize.plan import Shapes
    from ...quantize.rounding import Method
    from ...quantize.search import Chosen
    from ...runtimes.protocol import Target
    from .measurements import Measurements

_LADDER: Final = (4.25, 4.5, 5.0, 6.0, 7.0, 8.0)  # bits a weight of the menu's further rows
_ROUNDS: Final = 2  # of weighing components by pictures: the second at the mixture that the first led to
_FLOAT32: Final = ("loss", "fp32")  # rows of the tolerances
_TRIES: Final = 5  # of reaching a signal-to-noise ratio


def candidates(runtimes: tuple[Target, ...]) -> tuple[str, ...]:
    """Schemes of integer weights and float activations that all of `runtimes` execute, and fp16 if they all do.

    Raises:
        UnsupportedPrecision: there are fewer than two, so nothing can be chosen.
    """
    from ...quantize.scheme import parse_scheme

    shared = set.intersection(*(set(runtime.precisions) for runtime in runtimes))
    schemes = [parse_scheme(name) for name in shared]
    found = tuple(sorted(s.name for s in schemes if not s.is_float and s.activation_bits == 32))
    half = ("fp16",) if "fp16" in shared else ()
    if len(found) < 2:
        names = " and ".join(repr(runtime.name) for runtime in runtimes)
        raise UnsupportedPrecision(
            f"a search needs two or more schemes of integer weights; target {names} runs {', '.join(found) or 'none'}",
            hint="give one --target whose schemes `diffusette targets` lists, or --precision",
        )
    return (*found, *half)


def refuse_goal(goal: Goal, shapes: Mapping[str, Shapes], schemes: tuple[str, ...], target: str) -> None:
    """Raise, before anything is measured, if no choice of schemes has this size, or float32 itself not this SNR.

    Raises:
        UsageError: it names the smallest or the largest that can be had.
    """
    from ...quantize.losses import bits_only
    from ...quantize.search import frontier
    from ...validate.tolerances import TOLERANCES

    table = bits_only(shapes, schemes)
    least = table.bits(frontier(table, dict.fromkeys(shapes, 1.0))[0])
    most = table.most_bits()
    wanted = _bits_of(goal, table)
    if wanted is not None and wanted < least:
        enough = ceil(100 * least / table.total) / 100, ceil(least / 8e4) / 100
        raise UsageError(
            f"{goal} cannot be met on {target}: the least is {least / table.total:.2f} bits a weight, "
            f"{least / 8e6:.2f} MB of weights",
            hint=f"--bits {enough[0]:.2f} or --budget {enough[1]:.2f}MB, or more; its schemes: {', '.join(schemes)}",
        )
    if wanted is not None and wanted > most:
        enough = floor(100 * most / table.total) / 100, floor(most / 8e4) / 100
        finest = schemes[-1]
        raise UsageError(
            f"{goal} exceeds the largest choice on {target}: the most, {finest} everywhere, is "
            f"{most / table.total:.2f} bits a weight, {most / 8e6:.2f} MB of weights",
            hint=f"--precision {finest} or fp32 needs no search; or --bits {enough[0]:.2f} or "
            f"--budget {enough[1]:.2f}MB, or less",
        )
    float32 = max(row.min_snr_db for (gate, _, _, scheme), row in TOLERANCES.items() if (gate, scheme) == _FLOAT32)
    if goal.min_snr is not None and goal.min_snr > float32:
        raise UsageError(
            f"{goal} cannot be met: on these runtimes float32 itself is held to {float32:g} dB",
            hint=f"--min-snr {float32:g} or less, or --precision fp32",
        )


def _bits_of(goal: Goal, table: LossTable) -> int | None:
    if goal.bits is not None:
        return int(goal.bits * table.total)
    return None if goal.budget is None else goal.budget * 8


def search(
    source: Checkpoint,
    size: tuple[int, int],
    recipe: Recipe,
    target: str,
    schemes: tuple[str, ...],
    goal: Goal,
    run: Runner,
    say: Callable[[str], None],
) -> Found:
    """Find the mixture of `schemes` that loses least under `goal`. Every measurement is a stage: it resumes.

    Raises:
        UsageError: the goal cannot be met; it says what can.
    """
    from ...quantize.search import within
    from .found_recipe import found_recipe
    from .measurements import Measurements, fp16_snr

    shapes = parameters_of(source)
    refuse_goal(goal, shapes, schemes, target)
    samples = draw_samples(source, size, recipe.rounding, run)
    if goal.min_snr is not None and "fp16" in schemes:  # before minutes of rounding
        _refuse_beyond(goal.min_snr, fp16_snr(source, size, samples, run), slack=1.0)
    bench = Measurements(source, size, samples, schemes, recipe.rounding, shapes, run)
    table = bench.table
    wanted = _bits_of(goal, table)

    def choose(weights: Mapping[str, float]) -> Chosen:
        if wanted is not None:
            chosen = within(table, weights, wanted)
            assert chosen is not None  # `refuse_goal` has seen to it
            return chosen
        return _until_snr(bench, goal.min_snr or 0.0)

    weights = dict.fromkeys(table.options, 1.0)
    chosen = choose(weights)
    if bench.cheap and goal.min_snr is None:
        for _ in range(_ROUNDS):
            weights = bench.weigh(chosen)
            chosen = choose(weights)
    picked = table.bits(chosen)
    rows = {picked: bench.row(chosen, chosen=True)}
    for bits in _LADDER:
        other = within(table, weights, int(bits * table.total))
        if other is not None and table.bits(other) not in rows:
            rows[table.bits(other)] = bench.row(other, chosen=False) if bench.cheap else bench.expected(other)
    menu = tuple(rows[bits] for bits in sorted(rows))
    say(f"search: {goal} leads to {picked / table.total:.2f} bits a weight, {picked / 8e6:.2f} MB of weights")
    tuned = bench.tuned(rows[picked])
    rounding: Method = "tuned" if tuned else "gptq"
    written = found_recipe(recipe, chosen, table, tuned or rows[picked], goal, target, rounding)
    return Found(goal, target, written, menu, bench.rounded_with, tuned)


def _until_snr(bench: Measurements, wanted: float) -> Chosen:
    """The cheapest mixture whose components all measure at least `wanted` dB."""
    from ...quantize.search import until

    aims = dict.fromkeys(bench.table.options, wanted)
    chosen: Chosen = {}
    for _ in range(_TRIES):
        for part, aim in aims.items():
            table = bench.only(part)
            found = until(table, {part: 1.0}, partial(_loses_less, table, part, 10 ** (-aim / 10)))
            chosen[part] = (found or bench.best(part))[part]
        measured = bench.row(chosen, chosen=False, pictures=False).snr_db
        short = {part: wanted - snr for part, snr in measured.items() if snr < wanted}
        if not short:
            return chosen
        if all(chosen[part] == bench.best(part)[part] for part in short):
            _refuse_beyond(wanted, measured)
        for part, gap in short.items():
            aims[part] += gap + 0.2
    raise UsageError(
        f"--min-snr {wanted:g} was not reached in {_TRIES} attempts: {', '.join(short)}", hint="ask for a little less"
    )


def _refuse_beyond(wanted: float, best: Mapping[str, float], slack: float = 0.0) -> None:
    """Raise if `wanted` exceeds the SNR that a component has at its best.

    Args:
        best: component -> dB with every layer at its best.
        slack: dB by which it may exceed that.
    Raises:
        UsageError: it says what can be had.
    """
    part, found = min(best.items(), key=lambda each: each[1])
    if wanted > found + slack:
        raise UsageError(
            f"--min-snr {wanted:g} cannot be met: {part} has {found:.1f} dB with every layer at its best",
            hint=f"--min-snr {floor(10 * found) / 10:.1f} or less, or --precision fp32",
        )


def _loses_less(table: LossTable, part: str, most: float, chosen: Chosen) -> bool:
    return table.loss(part, chosen[part]) <= most
