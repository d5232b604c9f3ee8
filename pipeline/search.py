"""Bits for each layer under a goal: measure what layers cost, allocate, try mixtures, and write it all down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from .artifacts import Checkpoint
from .calibrate import draw_samples
from .errors import UnsupportedPrecision, UsageError
from .recipe import Recipe, parameters_of
from .stage import Runner

if TYPE_CHECKING:
    from ..quantize.calibrated import RoundedLayers
    from ..quantize.losses import LossTable
    from ..quantize.plan import Plan, Shapes
    from ..quantize.samples import Samples
    from ..quantize.search import Chosen
    from ..runtimes.protocol import Target
    from ..validate.mixture import Mixture

_LADDER: Final = (4.25, 4.5, 5.0, 6.0, 7.0, 8.0)  # bits a weight of the menu's further rows
_SHORT_LADDER: Final = (6.0,)  # where a row takes minutes
_PICTURES: Final = 4  # prompts that a mixture is drawn for
_ROUNDS: Final = 2  # of weighing components by pictures: the second at the mixture that the first led to
_TRIALS: Final = 16  # layers of a component that are rounded alone, where a call takes seconds; else all are
_TRIES: Final = 5  # of reaching a signal-to-noise ratio


@dataclass(frozen=True, slots=True)
class Goal:
    """What the user asked for; exactly one of the three."""

    bits: float | None = None  # a weight, over all components, scales and biases included
    budget: int | None = None  # bytes of all weights, in one form
    min_snr: float | None = None  # dB, of every component

    def __post_init__(self) -> None:
        given = [value for value in (self.bits, self.budget, self.min_snr) if value is not None]
        if len(given) != 1:
            raise UsageError("--bits, --budget and --min-snr exclude each other", hint="choose one of them")
        if not given[0] > 0:
            what = "--bits" if self.bits is not None else "--budget" if self.budget is not None else "--min-snr"
            raise UsageError(f"{what} {given[0]:g} leaves nothing", hint="for example --bits 4.5 or --budget 300MB")

    def __str__(self) -> str:
        if self.bits is not None:
            return f"--bits {self.bits:g}"
        if self.budget is not None:
            return f"--budget {self.budget / 1e6:g}MB"
        return f"--min-snr {self.min_snr:g}"


@dataclass(frozen=True, slots=True)
class MenuRow:
    """One mixture on the frontier, measured in PyTorch with its weights rounded."""

    bits: float  # a weight
    bytes: int
    snr_db: Mapping[str, float]  # component -> over its calibration samples
    psnr_db: float | None  # of pictures, the median; None where drawing takes too long
    chosen: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "bits_per_weight": round(self.bits, 3),
            "bytes": self.bytes,
            "snr_db": {part: round(value, 2) for part, value in self.snr_db.items()},
            "image_psnr_db": None if self.psnr_db is None else round(self.psnr_db, 2),
            "chosen": self.chosen,
        }


@dataclass(frozen=True, slots=True)
class Found:
    """What a search led to: an ordinary recipe, and the menu that it was chosen from."""

    goal: Goal
    target: str  # for people: several may share a search
    recipe: Recipe
    menu: tuple[MenuRow, ...]  # fewest bits first
    schemes: tuple[str, ...]  # of integers, that every layer was rounded at
    files: tuple[str, ...] = ()  # paths of the recipe and the plot, once written

    def to_json(self) -> dict[str, Any]:
        return {"goal": str(self.goal), "menu": [row.to_json() for row in self.menu], "files": list(self.files)}


def candidates(runtimes: tuple[Target, ...]) -> tuple[str, ...]:
    """Schemes of integer weights and float activations that all of `runtimes` execute, and fp16 if they all do.

    Raises:
        UnsupportedPrecision: there are fewer than two, so nothing can be chosen.
    """
    from ..quantize.scheme import parse_scheme

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
    """Refuse, before anything is measured, a size that no choice of schemes can have.

    Raises:
        UsageError: it says what the least is.
    """
    from ..quantize.losses import bits_only
    from ..quantize.search import frontier

    table = bits_only(shapes, schemes)
    least = table.bits(frontier(table, dict.fromkeys(shapes, 1.0))[0])
    wanted = _bits_of(goal, table)
    if wanted is not None and wanted < least:
        raise UsageError(
            f"{goal} cannot be met on {target}: the least is {least / table.total:.2f} bits a weight, "
            f"{least / 8e6:.2f} MB of weights",
            hint=f"--bits {least / table.total + 0.005:.2f} or more; its schemes: {', '.join(schemes)}",
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
    from ..quantize.search import until, within
    from .found_recipe import found_recipe

    shapes = parameters_of(source)
    refuse_goal(goal, shapes, schemes, target)
    bench = _Bench(source, size, draw_samples(source, size, recipe, run), schemes, recipe, shapes, run)
    table = bench.table
    wanted = _bits_of(goal, table)

    def choose(weights: Mapping[str, float]) -> Chosen:
        if wanted is not None:
            chosen = within(table, weights, wanted)
            assert chosen is not None  # `refuse_goal` has seen to it
            return chosen
        return _until_snr(bench, goal.min_snr or 0.0, until)

    weights = dict.fromkeys(table.options, 1.0)
    chosen = choose(weights)
    if bench.cheap and goal.min_snr is None:
        for _ in range(_ROUNDS):
            weights = bench.weigh(chosen)
            chosen = choose(weights)
    picked = table.bits(chosen)
    rows = {picked: bench.row(chosen, chosen=True)}
    for bits in _LADDER if bench.cheap else _SHORT_LADDER:
        other = within(table, weights, int(bits * table.total))
        if other is not None and table.bits(other) not in rows:
            rows[table.bits(other)] = bench.row(other, chosen=False)
    menu = tuple(rows[bits] for bits in sorted(rows))
    say(f"search: {goal} leads to {picked / table.total:.2f} bits a weight, {picked / 8e6:.2f} MB of weights")
    written = found_recipe(recipe, chosen, table, rows[picked], goal, target)
    return Found(goal, target, written, menu, bench.codes)


def _until_snr(bench: _Bench, wanted: float, until: Any) -> Chosen:
    """The cheapest mixture whose components all measure at least `wanted` dB."""
    aims = dict.fromkeys(bench.table.options, wanted)
    chosen: Chosen = {}
    for _ in range(_TRIES):
        for part, aim in aims.items():
            table, limit = bench.only(part), 10 ** (-aim / 10)
            found = until(table, {part: 1.0}, lambda c, t=table, p=part, m=limit: t.loss(p, c[p]) <= m)
            best = found or until(table, {part: 1.0}, lambda c: False) or bench.best(part)
            chosen[part] = best[part]
        measured = bench.row(chosen, chosen=False, pictures=False).snr_db
        short = {part: wanted - snr for part, snr in measured.items() if snr < wanted}
        if not short:
            return chosen
        if all(chosen[part] == bench.best(part)[part] for part in short):
            part = max(short, key=lambda name: short[name])
            raise UsageError(
                f"--min-snr {wanted:g} cannot be met: {part} has {measured[part]:.1f} dB with every layer at its best",
                hint=f"--min-snr {measured[part]:.1f} or less, or --precision fp16",
            )
        for part, gap in short.items():
            aims[part] += gap + 0.2
    raise UsageError(
        f"--min-snr {wanted:g} was not reached in {_TRIES} attempts: {', '.join(short)}", hint="ask for a little less"
    )


class _Bench:
    """Everything that is measured about one checkpoint, each through `run`."""

    def __init__(
        self,
        source: Checkpoint,
        size: tuple[int, int],
        samples: Samples,
        schemes: tuple[str, ...],
        recipe: Recipe,
        shapes: Mapping[str, Shapes],
        run: Runner,
    ) -> None:
        from ..validate.calibration import calibration_plans, is_cheap

        self.cheap = is_cheap(source, size)
        self._source, self._size, self._samples, self._run, self._shapes = source, size, samples, run, shapes
        self._plan = calibration_plans(source, size, recipe.calibrate.prompts)[0]
        self._calls = 24 if self.cheap else 3
        self.codes: tuple[str, ...] = ()
        self.rounded: dict[str, tuple[RoundedLayers, ...]] = {}
        self.table = self._measure(schemes)

    def _measure(self, schemes: tuple[str, ...]) -> LossTable:
        """What every layer costs at every scheme: an estimate for all, corrected by trials of one scheme."""
        from ..quantize.calibrated import round_layers, stored_schemes
        from ..quantize.losses import bits_only, corrected, estimates, loudest, with_losses
        from ..quantize.scheme import parse_scheme
        from ..quantize.sensitivity import MeasureGains, TryLayers

        losses = {}
        codes = self.codes = tuple(name for name in schemes if not parse_scheme(name).is_float)
        base = min(map(parse_scheme, codes), key=lambda s: (s.weight_bits, -(s.group or 2**31))).name
        for part, source in self._source.components.items():
            rounded = self.rounded[part] = round_layers(source, self._samples, codes, self._run)
            gains = self._run(MeasureGains(source, self._samples, 2 * self._calls))
            estimated = estimates(source, rounded, gains, schemes)
            at = {name: stored_schemes(name, tuple(self._shapes[part][name]), (base,))[0].name for name in estimated}
            trials = tuple(sorted(loudest(estimated, at, None if self.cheap else _TRIALS)))
            calls = 12 if self.cheap else 2
            tried = self._run(TryLayers(source, self._samples, rounded, trials, base, calls))
            losses[part] = corrected(estimated, tried.losses, at)
        return with_losses(bits_only(self._shapes, schemes), losses)

    def only(self, part: str) -> LossTable:
        """The table of one component."""
        from ..quantize.losses import LossTable

        whole = self.table
        return LossTable({part: whole.options[part]}, {part: whole.fixed_bits[part]}, {part: whole.numbers[part]})

    def best(self, part: str) -> Chosen:
        """Every layer of a component at the end of its hull."""
        from ..quantize.search import frontier

        table = self.only(part)
        chosen, steps = frontier(table, {part: 1.0})
        for step in steps:
            chosen[part][step.parameter] = step.scheme
        return chosen

    def weigh(self, chosen: Chosen) -> dict[str, float]:
        """Component -> what a unit of its loss does to pictures, from drawing with that component alone rounded."""
        weights = {}
        for part in chosen:
            if part == "vae_encoder":
                continue
            mixture = self._try({part: chosen[part]}, part, pictures=True)
            weights[part] = mixture.picture_error / max(self.table.loss(part, chosen[part]), 1e-30)
        if "vae_encoder" in chosen:  # pictures from text never run it: as dear as the decoder
            weights["vae_encoder"] = weights["vae_decoder"]
        return weights

    def row(self, mixture: Chosen, *, chosen: bool, pictures: bool = True) -> MenuRow:
        """Measure one mixture of all components."""
        bits = self.table.bits(mixture)
        found = self._try(mixture, f"{bits / self.table.total:.2f} bits", pictures=pictures and self.cheap)
        return MenuRow(bits / self.table.total, -(-bits // 8), found.snr_db, found.median_psnr_db, chosen)

    def _try(self, mixture: Chosen, form: str, *, pictures: bool) -> Mixture:
        from ..validate.mixture import TryMixture

        plans: dict[str, Plan] = {part: plan_for_choice(mixture[part], self._shapes[part]) for part in mixture}
        rounded = {part: self.rounded[part] for part in plans}
        picture = self._plan if pictures else None
        stage = TryMixture(self._source, self._size, self._samples, plans, rounded, self._calls, picture, form)
        return self._run(stage)


def plan_for_choice(chosen: Mapping[str, str], shapes: Shapes) -> Plan:
    """The plan of one component."""
    from ..quantize.plan import plan_of

    return plan_of(chosen, shapes)
