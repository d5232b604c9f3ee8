"""Precision `auto`: the smallest scheme that passes its gates and is not slower than float32 here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from ..stages.artifacts import ROLES, Role
from ..stages.errors import UsageError
from ..validate.reference.calibrate import calibrated
from ..validate.speed.race import SLOWER, whole_ratio
from ..validate.tolerances import AUTO_IMAGE_DB, image_tolerance
from .build import Built, TargetBuild, entries, why_no_gain

if TYPE_CHECKING:
    from ..quantize.plan import Plan, Shapes
    from ..runtimes.protocol import Target
    from .recipe import Recipe

_CALLS: Final[Mapping[Role, int]] = {"text": 2, "denoiser": 40, "control": 40, "decoder": 1}

PICTURE: Final = {name: _CALLS[role] for name, role in ROLES.items() if role in _CALLS}
"""Component -> calls of one picture: 20 steps, two branches of guidance."""


def choose(work: TargetBuild) -> Built:
    """The smallest candidate that is not slower than float32 here and passes its gates; float32 is the last."""
    job, probes, say = work.job, work.ask(), work.progress.say
    if why := why_no_gain():
        say(why)
    tried = candidates(work.target, job.recipe, job.parameters)
    for number, (settled, plans) in enumerate(tried, start=1):
        label, last = f"{work.target.name} {settled.quantize.precision}", number == len(tried)
        plans = calibrated(plans, job.checkpoint, job.pixels, settled.rounding, work.run)
        plans, models = work.models(plans, settled, probes)
        speeds = work.race({part: model for part, model in models.items() if model.precision != "fp32"}, probes)
        default = {part: forms[""] for part, forms in speeds.items()}
        ratio = whole_ratio(default, PICTURE) if speeds else 1.0
        if speeds and whole_ratio(default, PICTURE, least=True) > SLOWER and not last:
            say(f"auto: {label} is slower than fp32 here: a picture takes {ratio:.2f}x of its time")
            continue
        parity = work.prove(models, plans, probes)
        if not parity.ok and not last:
            say(f"auto: {label} does not pass its gates: {parity.failures()[0]}")
            continue
        if parity.image and parity.image.psnr_db < AUTO_IMAGE_DB and not last:
            worst = f"{parity.image.psnr_db:.1f} dB in the worst picture, {AUTO_IMAGE_DB:g} are required"
            say(f"auto: {label} passes its gates, but its error may be visible: {worst}")
            continue
        alike = "; two loads of one model differ by as much" if 1 < ratio <= SLOWER else ""
        say(f"auto: {label} is chosen; a picture takes {ratio:.2f}x of fp32's time here{alike}")
        return Built(settled, plans, models, parity, entries(speeds))
    raise AssertionError("float32 is always a candidate")


def candidates(
    target: Target, recipe: Recipe, parameters: Mapping[str, Shapes]
) -> list[tuple[Recipe, dict[str, Plan]]]:
    """What `auto` tries on `target`, smallest first: the schemes whose pictures are held to `AUTO_IMAGE_DB`."""
    from ..quantize.scheme import parse_scheme

    found = []
    for precision in target.precisions:
        if parse_scheme(precision).computes_half:
            continue  # a race is run here, and this pays on other processors
        try:
            if image_tolerance(target.name, precision).min_psnr_db < AUTO_IMAGE_DB:
                continue
        except UsageError:  # no tolerance is written down: nothing could prove it
            continue
        settled = recipe.settled(precision)
        plans = settled.plans(parameters)
        found.append((sum(plan.bits(parameters[name]) for name, plan in plans.items()), settled, plans))
    return [(settled, plans) for _, settled, plans in sorted(found, key=lambda each: each[0])]
