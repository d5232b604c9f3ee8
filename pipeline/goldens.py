"""Golden vectors of a bundle: drawn before it is packed, replayed by `check-goldens`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..runtimes.txt2img.canvas import INPAINTING_CHANNELS, read_canvas
from ..runtimes.txt2img.control import Control, read_control
from ..runtimes.txt2img.generate import draw, generate
from ..runtimes.txt2img.model_run import run_model
from ..validate.golden_checks import Check, check_goldens
from ..validate.goldens import (
    CANVAS_PLACE,
    CONTROL_PLACE,
    MASK_PLACE,
    PLACE,
    PROMPT,
    SEED,
    Encoding,
    Goldens,
    read_goldens,
    write_goldens,
)
from ..validate.probes import pictures_for, probe_canvas
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
    from ..runtimes.txt2img.canvas import Canvas
    from ..runtimes.txt2img.generate import TextToImage
    from .schedule import CompiledSchedule
    from .stage import Runner

THREADS = 2


@dataclass(frozen=True, slots=True)
class DrawnGoldens:
    """A folder with what goes into the bundle: goldens.json, and pictures that they are about."""

    folder: Path
    places: tuple[str, ...]  # in the bundle; a file of the same name is in the folder
    digest: str = ""

    def assets(self) -> dict[str, Path]:
        """Place in the bundle -> file."""
        return {place: self.folder / Path(place).name for place in self.places}


@dataclass(frozen=True)
class DrawGoldens:
    """Draw with a bundle that nobody sees yet, in this (child) process."""

    bundle: Path  # a folder with a manifest and the files it names
    facts: str  # digest of that manifest: files, schedules, runtime, guidance

    name: ClassVar[str] = "goldens"
    version: ClassVar[int] = 3
    tools: ClassVar[tuple[str, ...]] = ("numpy", "tokenizers")
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
        encoding = None
        if "vae_encoder" in bundle.components:
            canvas = pictures["canvas"] or replace(probe_canvas(models.size), mask=None)
            _write_canvas(canvas, into)
            canvas = _read_canvas(into, 1.0, models)
            pictures["canvas"] = canvas if pictures["canvas"] else None
            encoding = encode(models, replace(canvas, strength=_strength(schedule)), PROMPT, SEED)
        if models.controlled:
            _write_png(pictures["control"].picture[0].transpose(1, 2, 0), into / Path(CONTROL_PLACE).name)
        drawing = draw(models, PROMPT, seed=SEED, keep_trajectory=True, **pictures)
        runtime = f"{bundle.manifest.target.name} {target.version()}"
        tokenizers, timesteps = (models.tokenizer, models.tokenizer_2), [row.timestep for row in schedule.rows]
        goldens = write_goldens(tokenizers, drawing, timesteps, runtime, encoding)
        (into / Path(PLACE).name).write_text(goldens.to_json(), encoding="utf-8", newline="\n")
        places = (PLACE, CONTROL_PLACE, CANVAS_PLACE, MASK_PLACE)
        return DrawnGoldens(into, tuple(place for place in places if (into / Path(place).name).exists()))


def encode(models: TextToImage, canvas: Canvas, prompt: str, seed: int) -> Encoding:
    """A picture through the VAE encoder, and to the point where the UNet would be called."""
    with models.open("vae_encoder") as encoder:
        feeds = {"sample": canvas.image.astype(np.float32)}
        encoded = run_model(encoder, feeds, models.time_embedding, "vae_encoder")
    control = Control(None, scale=0.0) if models.controlled else None  # where it starts is the same
    with closing(generate(models, prompt, seed=seed, canvas=canvas, control=control)) as steps:
        start = next(progress.latents for progress in steps if progress.component == "unet")
    assert start is not None
    return Encoding(canvas.strength, encoded, start)


def _strength(schedule: CompiledSchedule) -> float:
    """Half of the steps, where the solver can start in the middle."""
    return 1.0 if schedule.history > 1 or schedule.steps == 1 else 0.5


def _write_canvas(canvas: Canvas, into: Path) -> None:
    _write_png((canvas.image[0].transpose(1, 2, 0) + 1) / 2, into / Path(CANVAS_PLACE).name)
    if canvas.mask is not None:
        _write_png(canvas.mask[0, 0], into / Path(MASK_PLACE).name)


def _read_canvas(folder: Path, strength: float, models: TextToImage) -> Canvas:
    mask = folder / Path(MASK_PLACE).name if models.input_channels == INPAINTING_CHANNELS else None
    return read_canvas(folder / Path(CANVAS_PLACE).name, mask, strength, models.size)


def _write_png(picture: Array, file: Path) -> None:
    """[H, W, 3] or [H, W] in 0..1, rounded to 8 bits; zeros and ones are kept exactly."""
    from PIL import Image

    Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(file, format="PNG")


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
    return replace(inputs, assets={**inputs.assets, **drawn.assets()})


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
        _refuse_missing(bundle, CONTROL_PLACE)
        pictures["control"] = read_control(Path(bundle.path, CONTROL_PLACE), None, models.size)
    canvas = encoding = None
    if goldens.canvas:
        _refuse_missing(bundle, CANVAS_PLACE, *([MASK_PLACE] if pictures["canvas"] else []))
        canvas = _read_canvas(Path(bundle.path, PLACE).parent, goldens.canvas.strength, models)
        pictures["canvas"] = replace(canvas, strength=1.0) if pictures["canvas"] else None
    with progress.running("goldens"):
        if canvas:
            encoding = encode(models, canvas, wanted.prompt, wanted.seed)
        drawing = draw(
            models,
            wanted.prompt,
            wanted.negative,
            guidance=wanted.guidance,
            seed=wanted.seed,
            keep_trajectory=True,
            **pictures,
        )
    return goldens, list(check_goldens(goldens, (models.tokenizer, models.tokenizer_2), drawing, encoding))


def _refuse_missing(bundle: Bundle, *places: str) -> None:
    declared = {file.path for file in bundle.manifest.assets}
    for place in places:
        if place not in declared:
            raise BundleError(f"{place}: no such file in the manifest", hint="convert the checkpoint again")
