"""A conversion, resolved before anything is made: nothing later asks again for what a `Job` holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..stages.artifacts import Checkpoint
from ..stages.cache import Cache
from ..stages.errors import UsageError
from ..stages.progress import Progress
from .recipe import Recipe, load_recipe, merged, parameters_of
from .recipe_tables import AUTO
from .request import Request
from .sampling import Sampling, recipe_for, sampling_of

if TYPE_CHECKING:
    from ..quantize.plan import Plan, Shapes
    from ..runtimes.protocol import Target
    from .destination import Destination
    from .forecast import Forecast
    from .search.goal import Found


@dataclass(frozen=True, slots=True)
class Job:
    """A request, resolved.

    Args:
        recipe: in force, with what the command line says and what a search found.
        pixels: height and width.
        parameters: component -> name -> shape of every parameter.
        plans: component -> how its weights are stored; with precision auto, float32, which is built in any case.
        targets: name -> runtime.
        places: name of a target -> where its bundle goes.
    """

    request: Request
    checkpoint: Checkpoint
    recipe: Recipe
    sampling: Sampling
    pixels: tuple[int, int]
    parameters: Mapping[str, Shapes]
    plans: Mapping[str, Plan]
    targets: Mapping[str, Target]
    places: Mapping[str, Destination]
    forecast: Forecast
    found: Found | None = None

    @property
    def is_automatic(self) -> bool:
        """Whether the precision is yet to be chosen."""
        return self.recipe.quantize.precision == AUTO


def resolve(request: Request, cache: Cache, progress: Progress) -> Job:
    """Read headers and refuse what cannot be done; a search, if one is asked for, is the only work.

    Raises:
        DiffusetteError: see `errors`; nothing at `output` has changed then.
    """
    from ..checkpoints.checkpoint import open_checkpoint
    from ..checkpoints.surveyed import surveyed
    from .forecast import forecast, refuse_if_too_small

    headers = open_checkpoint(request.checkpoint, companions=request.companions, survey=False)
    given = request.recipe
    recipe = given if isinstance(given, Recipe) else load_recipe(given or recipe_for(headers))
    targets = _targets(request, recipe)
    recipe = merged(recipe, precision=request.precision, size=request.size, goldens=request.goldens)
    for target in targets.values():
        target.require_build()  # fail in the first second, not after the export
    recipe.check_family(headers)
    sampling = sampling_of(headers, recipe)
    request.refuse_contradictions()
    checkpoint = surveyed(headers, cache.memo)
    parameters, pixels = parameters_of(checkpoint), recipe.size_for(checkpoint)
    places = _places(request, targets)
    found = None
    if request.goal is not None:
        from .search.run_search import run_search

        found = run_search(request, checkpoint, recipe, parameters, targets, places, cache, progress)
        recipe = found.recipe
    automatic = recipe.quantize.precision == AUTO
    if automatic and not request.gate:
        raise UsageError("precision auto needs the gates", hint="leave out --no-gate, or name a precision")
    plans = (recipe.settled("fp32") if automatic else recipe).plans(parameters)
    for target in targets.values():
        _refuse_unsupported(target, checkpoint, recipe, plans)
    labels = {part: plan.label for part, plan in plans.items()}
    for name, place in places.items():
        place.refuse_if_taken(checkpoint, name, pixels, None if automatic else labels)
    needed = forecast(checkpoint, tuple(targets), labels, pixels, gate=request.gate)
    if not request.ignore_forecast:
        refuse_if_too_small(needed, cache.root, Path(request.output))
    if found:
        plans = {part: replace(plan, rounded_with=found.schemes) for part, plan in plans.items()}
    return Job(request, checkpoint, recipe, sampling, pixels, parameters, plans, targets, places, needed, found)


def _targets(request: Request, recipe: Recipe) -> dict[str, Target]:
    from ..quantize.plan import Plan
    from ..runtimes.checks import refuse_schemes
    from ..runtimes.registry import TARGETS, get_target

    names = request.targets or ((recipe.target.name,) if recipe.target.name else tuple(TARGETS))
    targets = {name: get_target(name, **recipe.target_options(name)) for name in dict.fromkeys(names)}
    if request.precision is not None and request.precision != AUTO:
        for target in targets.values():
            refuse_schemes(target, "any component", Plan(request.precision))
    return targets


def _places(request: Request, targets: Mapping[str, Target]) -> dict[str, Destination]:
    from .destination import Destination

    root = Path(os.path.realpath(request.output))
    return {name: Destination(root / name if len(targets) > 1 else root, request.overwrite) for name in targets}


def _refuse_unsupported(target: Target, checkpoint: Checkpoint, recipe: Recipe, plans: Mapping[str, Plan]) -> None:
    from ..runtimes.checks import refuse_schemes
    from ..validate.reference.calibrate import refuse_activations

    if checkpoint.family not in target.families:
        raise UsageError(
            f"target {target.name!r} does not run family {checkpoint.family!r}",
            hint=f"it runs: {', '.join(target.families)}",
        )
    for part, plan in plans.items():
        refuse_schemes(target, part, plan)
    refuse_activations(target, recipe.rounding, plans)
