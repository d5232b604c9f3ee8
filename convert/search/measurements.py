"""Everything that a search measures about one checkpoint, each measurement a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import log10
from typing import TYPE_CHECKING, Final

from ...stages.artifacts import Checkpoint
from ...stages.stage import Runner
from .goal import MenuRow

if TYPE_CHECKING:
    from ...quantize.calibrated import RoundedLayers
    from ...quantize.losses import LossTable
    from ...quantize.plan import Plan, Shapes
    from ...quantize.rounding import Rounding
    from ...quantize.samples import Samples
    from ...quantize.search import Chosen
    from .mixture import Mixture

_TRIALS: Final = 12  # layers of a component that are rounded alone, where a call takes seconds; else all are
_CALLS: Final = 24  # of a component, on which a mixture is tried
_FEW_CALLS: Final = 3  # the same, where a call takes seconds
_SAMPLES: Final = 8  # of a component that its inputs are taken from, where a call takes seconds


class Measurements:
    """What layers and mixtures cost.

    Where a UNet call takes milliseconds, layers are rounded by GPTQ at every scheme, each is tried alone, and pictures
    are drawn. Where it takes seconds (`cheap` is false), losses come from rounding to the nearest on a few inputs of
    each layer, `_TRIALS` layers are tried alone, and one mixture is run: the one that was chosen. GPTQ then rounds
    that mixture only, when its models are built, and makes it better than the menu says.
    """

    def __init__(
        self,
        source: Checkpoint,
        size: tuple[int, int],
        samples: Samples,
        schemes: tuple[str, ...],
        rounding: Rounding,
        shapes: Mapping[str, Shapes],
        run: Runner,
    ) -> None:
        from ...validate.reference.calibration import calibration_plans, is_cheap

        self.cheap = is_cheap(source, size)
        self._source, self._size, self._samples, self._run, self._shapes = source, size, samples, run, shapes
        self._rounding = rounding
        self._plan = calibration_plans(source, size, rounding.prompts)[0]
        self._calls = _CALLS if self.cheap else _FEW_CALLS
        self.rounded_with: tuple[str, ...] = ()  # schemes of integers that every layer was rounded at by GPTQ
        self.rounded: dict[str, tuple[RoundedLayers, ...]] = {}
        self.table = self._measure(schemes)

    def _measure(self, schemes: tuple[str, ...]) -> LossTable:
        """What every layer costs at every scheme: an estimate for all, corrected by trials of one scheme."""
        from ...quantize.calibrated import round_layers, stored_schemes
        from ...quantize.losses import bits_only, corrected, estimates, loudest, with_losses
        from ...quantize.row_errors import EstimateErrors
        from ...quantize.scheme import parse_scheme
        from ...quantize.sensitivity import MeasureGains, TryLayers

        losses = {}
        codes = tuple(name for name in schemes if not parse_scheme(name).is_float)
        self.rounded_with = codes if self.cheap else ()
        base = min(map(parse_scheme, codes), key=lambda s: (s.weight_bits, -(s.group or 2**31))).name
        for part, source in self._source.components.items():
            if self.cheap:
                rounded = round_layers(source, self._samples, codes, self._run)
            else:
                rounded = (self._run(EstimateErrors(source, self._samples, codes, _SAMPLES)),)
            self.rounded[part] = rounded
            gains = self._run(MeasureGains(source, self._samples, 48 if self.cheap else 4))
            estimated = estimates(source, rounded, gains, schemes)
            at = {name: stored_schemes(name, tuple(self._shapes[part][name]), (base,))[0].name for name in estimated}
            trials = tuple(sorted(loudest(estimated, at, None if self.cheap else _TRIALS)))
            calls = 12 if self.cheap else 2
            tried = self._run(TryLayers(source, self._samples, rounded, trials, base, calls))
            losses[part] = corrected(estimated, tried.losses, at)
        return with_losses(bits_only(self._shapes, schemes), losses)

    def only(self, part: str) -> LossTable:
        """The table of one component."""
        from ...quantize.losses import LossTable

        whole = self.table
        return LossTable({part: whole.options[part]}, {part: whole.fixed_bits[part]}, {part: whole.numbers[part]})

    def best(self, part: str) -> Chosen:
        """Every layer of a component at the end of its hull."""
        from ...quantize.search import frontier

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
        share, size = bits / self.table.total, -(-bits // 8)
        plans = {
            part: replace(self._plan_of(part, schemes), samples=self._samples, rounded_with=self.rounded_with)
            for part, schemes in mixture.items()
            if self.rounded_with
        }
        return MenuRow(share, size, found.snr_db, found.median_psnr_db, chosen, plans=plans)

    def tuned(self, row: MenuRow) -> MenuRow | None:
        """A measured row once more, with its scales fitted to what whole components answer.

        None where that is dear, and where the recipe that the search began with asks for GPTQ alone.
        """
        from ...quantize.tuning import tuned_weights
        from ...validate.reference.calibrate import draw_for_tuning
        from ...validate.reference.calibration import can_be_tuned
        from .mixture import TryMixture

        if self._rounding.method == "gptq" or not can_be_tuned(self._source, self._size):
            return None
        if all(plan.is_float for plan in row.plans.values()):
            return None
        along = draw_for_tuning(self._source, self._size, self._rounding, self._run)
        coded = {part: plan for part, plan in row.plans.items() if not plan.is_float}
        plans = {**row.plans, **{part: replace(plan, tuned=along) for part, plan in coded.items()}}
        tuned = {part: tuned_weights(self._source.components[part], plans[part], self._run) for part in coded}
        codes = {part: each.weights for part, each in tuned.items()}
        form = f"{row.bits:.2f} bits, tuned"
        found = self._run(
            TryMixture(
                self._source, self._size, self._samples, plans, self.rounded, self._calls, self._plan, form, codes
            )
        )
        held_out = {part: (each.before_db, each.after_db) for part, each in tuned.items()}
        return replace(row, snr_db=found.snr_db, psnr_db=found.median_psnr_db, plans=plans, held_out_db=held_out)

    def expected(self, mixture: Chosen) -> MenuRow:
        """A mixture by what its layers cost alone; nothing is run."""
        bits = self.table.bits(mixture)
        snr = {part: -10 * log10(max(self.table.loss(part, schemes), 1e-30)) for part, schemes in mixture.items()}
        return MenuRow(bits / self.table.total, -(-bits // 8), snr, None, chosen=False, measured=False)

    def _try(self, mixture: Chosen, form: str, *, pictures: bool) -> Mixture:
        from .mixture import TryMixture

        plans = {part: self._plan_of(part, schemes) for part, schemes in mixture.items()}
        rounded = {part: self.rounded[part] for part in plans}
        picture = self._plan if pictures else None
        stage = TryMixture(self._source, self._size, self._samples, plans, rounded, self._calls, picture, form)
        return self._run(stage)

    def _plan_of(self, part: str, schemes: Mapping[str, str]) -> Plan:
        from ...quantize.plan import plan_of

        return plan_of(schemes, self._shapes[part])


def fp16_snr(source: Checkpoint, size: tuple[int, int], samples: Samples, run: Runner) -> Mapping[str, float]:
    """Component -> dB with all its weights at fp16, which needs no rounding along samples: no mixture has more."""
    from ...quantize.plan import Plan
    from ...validate.reference.calibration import is_cheap
    from .mixture import TryMixture

    plans = {part: Plan("fp16") for part in source.components}
    calls = _CALLS if is_cheap(source, size) else _FEW_CALLS
    return run(TryMixture(source, size, samples, plans, dict.fromkeys(plans, ()), calls, form="fp16")).snr_db
