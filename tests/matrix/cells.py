"""Cells of the tables in docs/kinds.md: a checkpoint on a runtime, converted, gated, validated and drawn with.

All runtimes of a row are converted by one command, and stages and sessions run in this process: what their own
processes are for is tested elsewhere, and starting some hundred of them would take most of the time.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import pytest
from diffusette.bundle import sessions
from diffusette.bundle.bundle import Bundle
from diffusette.bundle.draw import draw_with_bundle
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.convert.conversion import Conversion
from diffusette.convert.convert import convert_checkpoint
from diffusette.convert.recipe import Recipe, load_recipe
from diffusette.convert.recipe_tables import ScheduleChoice
from diffusette.convert.sampling import recipe_for
from diffusette.runtimes.mnn import convert as mnn_convert
from diffusette.runtimes.registry import TARGETS, get_target, open_model
from diffusette.runtimes.txt2img.canvas import INPAINTING_CHANNELS
from diffusette.runtimes.txt2img.control import Control
from diffusette.stages import run_stage as running
from diffusette.stages.artifacts import ALONE, Companions
from diffusette.stages.cache import Cache
from diffusette.stages.errors import MissingTool
from diffusette.stages.progress import Silent
from diffusette.stages.strict import adapter
from diffusette.validate import gate
from diffusette.validate.check import check_bundle
from diffusette.validate.layers import of_bundle as layers
from diffusette.validate.machines import stages as machine_stages
from diffusette.validate.reference import torch_session
from diffusette.validate.reference.origin import open_reference_checkpoint
from diffusette.validate.reference.probes import probe_canvas

DOCS: Final = Path(__file__).parents[2] / "docs"
WRITE: Final = "DIFFUSETTE_WRITE_KINDS"
SIZE: Final = (64, 64)


def in_this_process(stage: Any, into: Path, work: Path, watch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """`child.run_in_child` without the child; stages still go through JSON, as they do on their way to one."""
    kind = adapter(type(stage))
    artifact = kind.validate_json(kind.dump_json(stage)).run(into)
    facts = adapter(stage.output).dump_python(artifact, mode="json")
    measured = {"tree_peak_mib": 0, "own_peak_mib": 0}  # nothing of this process would tell
    return {name: fact for name, fact in facts.items() if name not in ("folder", "digest")}, measured


@contextmanager
def one_process() -> Iterator[None]:
    """Run stages and sessions in this process, on one thread; and let neither the disk nor the collector be waited for.

    What a power cut leaves is no matter of a test's folder, and the reference collects garbage after each model for
    the sake of gigabytes, which these have not: with all of PyTorch in memory that takes a fifth of a second each time.
    """
    with pytest.MonkeyPatch.context() as patch:
        for place in (running, layers):
            patch.setattr(place, "run_in_child", in_this_process)
        for place in (sessions, mnn_convert, machine_stages):  # a child is told plain values
            patch.setattr(place, "open_isolated", lambda _, told, threads, **__: open_model(asdict(told), threads))
        patch.setattr(gate, "THREADS", 1)
        patch.setattr(torch_session, "gc", SimpleNamespace(collect=lambda: 0))
        patch.setattr(os, "fsync", lambda _: None)
        yield
        gc.collect()


def lean_recipe(checkpoint: Path, companions: Companions = ALONE) -> Recipe:
    """The recipe that is taken for `checkpoint`, without the further schedules: compiling thirty takes seconds."""
    found = load_recipe(recipe_for(open_checkpoint(checkpoint, companions=companions, survey=False)))
    lean = found.schedule.model_copy(update={"also": ()})
    assert isinstance(lean, ScheduleChoice)
    return found.model_copy(update={"schedule": lean})


def runtimes() -> tuple[str, ...]:
    """Those that are installed."""

    def is_there(name: str) -> bool:
        try:
            get_target(name).require_build()
        except MissingTool:
            return False
        return True

    return tuple(name for name in TARGETS if is_there(name))


@dataclass
class Rows:
    """Converts each row once, for all runtimes."""

    cache: Cache
    folder: Path
    goldens: bool = False  # whether bundles get golden vectors
    done: dict[str, Conversion] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.cache.root / "work").mkdir(parents=True, exist_ok=True)  # the child's, which would make it

    def bundle(
        self,
        row: str,
        target: str,
        make: Callable[[Path], tuple[Path, Companions]],
        size: tuple[int, int] | None = None,
        **how: Any,
    ) -> Bundle:
        """The bundle of one cell, which has passed its gate.

        Args:
            make: writes the checkpoint of `row` into a folder, and says what to give to `convert`.
            size: height and width in pixels, where the checkpoint says more than tests have time for.
            how: further arguments of `convert`.
        """
        if target not in runtimes():
            pytest.skip(f"{target} is not installed")
        if row not in self.done:
            place = self.folder / row
            place.mkdir()
            checkpoint, given = make(place)
            self.done[row] = convert_checkpoint(
                checkpoint,
                place / "out",
                recipe=lean_recipe(checkpoint, given),
                targets=runtimes(),
                size=size,
                companions=given,
                goldens=self.goldens,
                **how,
                cache=self.cache,
            )
        found = next(c for c in self.done[row].converted if c.bundle.manifest.target.name == target)
        assert found.ok, found.parity.failures() if found.parity else None
        return found.bundle


def check_cell(bundle: Bundle, cache: Cache, control: Control | None = None) -> dict[str, float]:
    """Validate `bundle` with pictures, and draw with it, telling neither anything.

    Args:
        control: for a bundle with a ControlNet, what to draw along.
    Returns:
        What docs/kinds.md shows: SNR of the UNet and PSNR of pictures, in dB.
    """
    report, _ = check_bundle(bundle, threads=1, cache=cache, progress=Silent())
    assert report.ok
    assert report.image is not None
    canvas = probe_canvas(SIZE) if bundle.manifest.conditioning.input_channels == INPAINTING_CHANNELS else None
    drawing = draw_with_bundle(
        bundle, "a red star", seed=3, canvas=canvas, control=control, threads=1, progress=Silent()
    )
    assert drawing.image.shape == (*SIZE, 3)
    assert np.ptp(drawing.image) > 0.01
    variant = open_reference_checkpoint(bundle, None, cache).variant
    assert (drawing.steps, drawing.guidance) == (variant.steps, variant.guidance)
    losses = {part.component: part.loss.snr_db for part in report.components if part.loss}
    return {"unet_db": round(losses["unet"], 1), "picture_db": round(report.image.psnr_db, 1)}


def note(record: str, row: str, target: str, found: dict[str, float]) -> None:
    """Write what a cell that passed has measured to docs/`record`.json, when asked to measure for docs/kinds.md."""
    if os.environ.get(WRITE):
        file = DOCS / f"{record}.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        known.setdefault(row, {})[target] = found
        file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
