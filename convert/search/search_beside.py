"""A search as part of a conversion: its recipe and its plot lie beside the bundle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...stages.artifacts import Checkpoint
from ...stages.cache import Cache
from ...stages.progress import Progress
from ..destination import Destination
from ..recipe import Recipe
from .goal import Found, Goal
from .search import candidates, refuse_goal, search

if TYPE_CHECKING:
    from ...runtimes.protocol import Target
    from ...stages.stage import Runner


def search_beside(
    output: Path,
    source: Checkpoint,
    recipe: Recipe,
    runtimes: Sequence[Target],
    goal: Goal,
    overwrite: bool,
    cache: Cache,
    progress: Progress,
) -> Found:
    """Search, then write `OUTPUT.recipe.toml` and `OUTPUT.frontier.png`.

    Raises:
        UsageError: the goal cannot be met, or `output` is taken by something that is no bundle.
        UnsupportedPrecision: the runtimes share too few schemes to choose from.
    """
    from ...stages.publish import written
    from ...stages.run_stage import run_stage
    from ..recipe import parameters_of
    from .frontier import plot_frontier
    from .menu_times import with_times

    schemes = candidates(tuple(runtimes))
    target = " and ".join(runtime.name for runtime in runtimes)
    refuse_goal(goal, parameters_of(source), schemes, target)
    size = recipe.size_for(source)
    root = Path(os.path.realpath(output))
    for runtime in runtimes:  # minutes of work must not end at a folder that is in the way
        place = Destination(root / runtime.name if len(runtimes) > 1 else root, overwrite)
        place.refuse_if_taken(source, runtime.name, size, None)
    with cache.used():
        run: Runner = partial(run_stage, cache=cache, progress=progress)
        found = search(source, size, recipe, target, schemes, goal, run, progress.say)
        found = with_times(found, source, size, recipe.rounding, runtimes, run)
    root.parent.mkdir(parents=True, exist_ok=True)
    text, plot = (root.with_name(f"{root.name}.{ending}") for ending in ("recipe.toml", "frontier.png"))
    with written(text) as file:
        file.write_text(found.recipe.to_toml())
    with written(plot) as file:
        plot_frontier(found, file)
    return replace(found, files=(str(text), str(plot)))
