"""A search as part of a conversion: its recipe and its plot lie beside the bundle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...stages.artifacts import Checkpoint
from ...stages.cache import Cache
from ...stages.progress import Progress
from ...stages.publish import written
from ...stages.run_stage import run_stage
from ..destination import Destination
from ..recipe import Recipe
from .frontier import plot_frontier
from .goal import Found
from .menu_times import with_times
from .search import candidates, refuse_goal, search

if TYPE_CHECKING:
    from ...quantize.plan import Shapes
    from ...runtimes.protocol import Target
    from ...stages.stage import Runner
    from ..request import Request


def run_search(
    request: Request,
    checkpoint: Checkpoint,
    recipe: Recipe,
    parameters: Mapping[str, Shapes],
    targets: Mapping[str, Target],
    places: Mapping[str, Destination],
    cache: Cache,
    progress: Progress,
) -> Found:
    """Search for the request's goal, then write `OUTPUT.recipe.toml` and `OUTPUT.frontier.png`.

    Args:
        recipe: whose rules the search replaces.
        places: name of a target -> where its bundle will go.
    Raises:
        UsageError: the goal cannot be met, or a place is taken by something that is no bundle.
        UnsupportedPrecision: the targets share too few schemes to choose from.
    """
    assert request.goal is not None
    runtimes = tuple(targets.values())
    schemes, names = candidates(runtimes), " and ".join(targets)
    refuse_goal(request.goal, parameters, schemes, names)
    size = recipe.size_for(checkpoint)
    for name, place in places.items():  # minutes of work must not end at a folder that is in the way
        place.refuse_if_taken(checkpoint, name, size, None)
    with cache.used():
        run: Runner = partial(run_stage, cache=cache, progress=progress)
        found = search(checkpoint, size, recipe, names, schemes, request.goal, run, progress.say)
        found = with_times(found, checkpoint, size, recipe.rounding, runtimes, run)
    root = Path(os.path.realpath(request.output))
    root.parent.mkdir(parents=True, exist_ok=True)
    text, plot = (root.with_name(f"{root.name}.{ending}") for ending in ("recipe.toml", "frontier.png"))
    with written(text) as file:
        file.write_text(found.recipe.to_toml())
    with written(plot) as file:
        plot_frontier(found, file)
    return replace(found, files=(str(text), str(plot)))
