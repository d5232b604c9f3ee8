"""Golden vectors of a bundle: drawn before it is packed, replayed by `check-goldens`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..runtimes.txt2img.control import read_control
from ..runtimes.txt2img.generate import draw
from ..validate.goldens import (
    CONTROL_PLACE,
    PLACE,
    PROMPT,
    SEED,
    Check,
    Goldens,
    check_goldens,
    read_goldens,
    write_goldens,
)
from ..validate.probes import pictures_for
from .bundle import Bundle, open_bundle
from .errors import BundleError, UsageError
from .gate import calls_are_cheap
from .hashing import sha256_of_json
from .pack import staged
from .pack_inputs import PackInputs
from .progress import Progress
from .publish import scratch_folder
from .sessions import painter

if TYPE_CHECKING:
    from ..runtimes.protocol import Array
    from .schedule import CompiledSchedule
    from .stage import Runner

THREADS = 2


@dataclass(frozen=True, slots=True)
class DrawnGoldens:
    """A folder with goldens.json, and control.png where the bundle draws along a picture."""

    folder: Path
    controlled: bool = False
    digest: str = ""

    @property
    def file(self) -> Path:
        return self.folder / "goldens.json"


@dataclass(frozen=True)
class DrawGoldens:
    """Draw with a bundle that nobody sees yet, in this (child) process."""

    bundle: Path  # a folder with a manifest and the files it names
    facts: str  # digest of that manifest: files, schedules, runtime, guidance

    name: ClassVar[str] = "goldens"
    version: ClassVar[int] = 1
    tools: ClassVar[tuple[str, ...]] = ("numpy", "tokenizers", "scikit-image")
    output: ClassVar[type] = DrawnGoldens

    def key(self) -> Mapping[str, object]:
        return {"manifest": self.facts, "prompt": PROMPT, "seed": SEED, "threads": THREADS}

    def run(self, into: Path) -> DrawnGoldens:
        from ..runtimes.registry import get_target

        bundle = open_bundle(self.bundle)
        schedule = golden_schedule(bundle)
        target = get_target(bundle.manifest.target.name)
        models = replace(
            painter(bundle, schedule, THREADS), open=lambda name: target.open(bundle.model(name), threads=THREADS)
        )
        pictures = pictures_for(models)
        drawing = draw(models, PROMPT, seed=SEED, keep_trajectory=True, **pictures)
        runtime = f"{bundle.manifest.target.name} {target.version()}"
        goldens = write_goldens(
            (models.tokenizer, models.tokenizer_2), drawing, [row.timestep for row in schedule.rows], runtime
        )
        (into / "goldens.json").write_text(goldens.to_json(), encoding="utf-8", newline="\n")
        if models.controlled:
            _write_png(pictures["control"].picture, into / "control.png")
        return DrawnGoldens(into, models.controlled)


def _write_png(picture: Array, file: Path) -> None:
    """[1, 3, H, W] of zeros and ones, which a PNG keeps exactly."""
    from PIL import Image

    Image.fromarray((picture[0].transpose(1, 2, 0) * 255).astype(np.uint8)).save(file, format="PNG")


def golden_schedule(bundle: Bundle) -> CompiledSchedule:
    """The bundle's default; where a call of the UNet takes seconds, that scheduler with the fewest steps there is."""
    every = bundle.schedules()
    if calls_are_cheap(bundle.manifest):
        return every[0]
    return min((each for each in every if each.scheduler == every[0].scheduler), key=lambda each: each.steps)


def with_goldens(inputs: PackInputs, work: Path, run: Runner) -> PackInputs:
    """`inputs` with goldens among the assets.

    Args:
        work: a folder on the cache's disk, where the models can stand as a bundle without being copied.
    """
    with scratch_folder(work, "goldens") as folder:
        manifest = staged(inputs, folder)
        drawn = run(DrawGoldens(folder, sha256_of_json(manifest.model_dump(mode="json"))))
    more = {CONTROL_PLACE: drawn.folder / "control.png"} if drawn.controlled else {}
    return replace(inputs, assets={**inputs.assets, PLACE: drawn.file, **more})


def goldens_of(bundle: Bundle) -> Goldens:
    """The bundle's goldens.

    Raises:
        UsageError: it was converted without.
        BundleError: they are damaged.
    """
    if PLACE not in {file.path for file in bundle.manifest.assets}:
        raise UsageError(
            f"{bundle.path}: the bundle carries no goldens",
            hint="convert again with --goldens, or [bundle] goldens = true in the recipe",
        )
    return read_goldens(Path(bundle.path, PLACE).read_bytes(), PLACE)


def replay_goldens(bundle: Bundle, *, threads: int = THREADS, progress: Progress) -> tuple[Goldens, list[Check]]:
    """Draw again with the bundle's own runtime, and hold everything against its goldens.

    Raises:
        UsageError, BundleError: there are no goldens, or a file is damaged.
    """
    bundle.refuse_damage()
    goldens = goldens_of(bundle)
    wanted = goldens.picture
    try:
        schedule = bundle.schedule(wanted.scheduler, wanted.steps)
    except UsageError as missing:
        raise BundleError(f"{PLACE}: {missing.what}", hint="convert the checkpoint again") from None
    models = painter(bundle, schedule, threads)
    pictures = pictures_for(models)
    if models.controlled:  # the picture in the bundle, whatever would be drawn here today
        if CONTROL_PLACE not in {file.path for file in bundle.manifest.assets}:
            raise BundleError(f"{CONTROL_PLACE}: no such file in the manifest", hint="convert the checkpoint again")
        pictures["control"] = read_control(Path(bundle.path, CONTROL_PLACE), None, models.size)
    with progress.running("goldens"):
        drawing = draw(
            models,
            wanted.prompt,
            wanted.negative,
            guidance=wanted.guidance,
            seed=wanted.seed,
            keep_trajectory=True,
            **pictures,
        )
    return goldens, list(check_goldens(goldens, (models.tokenizer, models.tokenizer_2), drawing))
