"""Golden vectors of a bundle: drawn before it is packed, replayed by `check-goldens`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...bundle.bundle import Bundle, open_bundle
from ...bundle.pack import staged
from ...bundle.pack_inputs import PackInputs
from ...bundle.sessions import painter
from ...runtimes.arithmetic import CPU, PROVEN, arithmetic_named
from ...runtimes.machines.machine import HERE, Machine
from ...runtimes.registry import get_target
from ...runtimes.txt2img.canvas import INPAINTING_CHANNELS, read_canvas
from ...runtimes.txt2img.control import read_control
from ...runtimes.txt2img.generate import draw
from ...stages.errors import BundleError, UsageError
from ...stages.hashing import sha256_of_json
from ...stages.progress import Progress
from ...stages.publish import scratch_folder
from ...stages.stage import Stage
from ..gate import calls_are_cheap
from ..machines.stages import open_on
from ..reference.probes import pictures_for, probe_canvas
from .checks import Check, check_models, check_port, check_texts
from .file import SCHEMA, Goldens, read_goldens
from .limits import limits_of, loosest, new_limits
from .models import Recorder
from .replay import Replay, encode
from .write import (
    CANVAS_PLACE,
    CONTROL_PLACE,
    MASK_PLACE,
    PLACE,
    PROMPT,
    SEED,
    write_goldens,
)

if TYPE_CHECKING:
    from ...export.compiled_schedule import CompiledSchedule
    from ...runtimes.isolation import IsolatedSession
    from ...runtimes.protocol import Array
    from ...runtimes.txt2img.canvas import Canvas
    from ...runtimes.txt2img.generate import Progress as Event
    from ...runtimes.txt2img.generate import TextToImage
    from ...stages.stage import Runner
    from .limits import ArithmeticLimits, Limits

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
class DrawGoldens(Stage[DrawnGoldens], name="goldens", version=5, tools=("numpy", "tokenizers")):
    """Draw with a bundle that nobody sees yet, in this (child) process."""

    bundle: Path  # a folder with a manifest and the files it names
    facts: str  # digest of that manifest: files, schedules, runtime, guidance

    def key(self) -> Mapping[str, object]:
        limits = self._limits.model_dump(mode="json")
        return {"manifest": self.facts, "prompt": PROMPT, "seed": SEED, "threads": THREADS, "limits": limits}

    @property
    def _limits(self) -> Limits:
        bundle = open_bundle(self.bundle)
        arithmetics = get_target(bundle.manifest.target.name).arithmetics
        return new_limits(limits_of(arithmetics, [bundle.model(name).precision for name in bundle.components]))

    def run(self, into: Path) -> DrawnGoldens:
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
        recorder = Recorder(models.open)
        drawing = draw(replace(models, open=recorder.open), PROMPT, seed=SEED, keep_trajectory=True, **pictures)
        runtime = f"{bundle.manifest.target.name} {target.version()}"
        tokenizers, timesteps = (models.tokenizer, models.tokenizer_2), [row.timestep for row in schedule.rows]
        goldens = write_goldens(tokenizers, drawing, recorder.runs, timesteps, runtime, self._limits, encoding)
        (into / Path(PLACE).name).write_text(goldens.to_json(), encoding="utf-8", newline="\n")
        places = (PLACE, CONTROL_PLACE, CANVAS_PLACE, MASK_PLACE)
        return DrawnGoldens(into, tuple(place for place in places if (into / Path(place).name).exists()))


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


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a bundle drew, held against its goldens."""

    goldens: Goldens
    checks: tuple[Check, ...]
    arithmetics: Mapping[str, str]  # component -> name of the arithmetic it computed in
    machine: str


def replay_goldens(
    bundle: Bundle,
    *,
    machine: Machine = HERE,
    arithmetic: str = PROVEN,
    threads: int = THREADS,
    progress: Progress,
) -> Replayed:
    """Draw again with the bundle's own runtime, and hold everything against its goldens.

    Args:
        machine: where the models run; everything else is computed here.
        arithmetic: name of one of the target's, for every component; by default each computes in the one it is
            proven in.
    Raises:
        UsageError: there are no goldens, or the target has no such arithmetic.
        BundleError: a file is damaged.
    """
    arithmetics = _arithmetics(bundle, machine, arithmetic)
    bundle.refuse_damage()
    goldens = goldens_of(bundle)
    wanted = goldens.picture
    try:
        schedule = bundle.schedule(wanted.scheduler, wanted.steps)
    except UsageError as missing:
        raise BundleError(f"{PLACE}: {missing.what}", hint="convert the checkpoint again") from None

    def open_there(component: str) -> IsolatedSession:
        return open_on(machine, bundle.model(component), arithmetics[component], threads)

    models = replace(painter(bundle, schedule, threads), open=open_there)
    replay = _replay(bundle, goldens, models)
    with progress.running("goldens") as watch:
        checks = list(check_texts(goldens, (models.tokenizer, models.tokenizer_2)))
        if goldens.schema_ == SCHEMA:
            checks += check_port(goldens, replay.with_golden_answers(bundle.model))
        found = replay.with_models(_telling(progress, watch))
        checks += check_models(goldens, found, _limits(bundle, goldens, arithmetic, arithmetics))
    return Replayed(goldens, tuple(checks), arithmetics, machine.name)


def _arithmetics(bundle: Bundle, machine: Machine, asked: str) -> dict[str, str]:
    """Component -> name of the arithmetic it computes in there."""
    target = get_target(bundle.manifest.target.name)
    there = [each for each in target.arithmetics if each.device == machine.device]
    if not there:
        raise UsageError(
            f"target {target.name!r} does not run on {machine.name}", hint="its package has no such backend"
        )
    if asked != PROVEN:
        name = arithmetic_named(asked, there, f"{target.name} on {machine.name}").name
        return dict.fromkeys(bundle.components, name)
    if machine.device != CPU:  # models are proven on a processor; a device's first arithmetic is its float32
        return dict.fromkeys(bundle.components, there[0].name)
    return {name: target.proven_in(bundle.model(name)) for name in bundle.components}


def _telling(progress: Progress, watch: Callable[[float], None]) -> Callable[[Event], None]:
    def follow(event: Event) -> None:
        progress.advance(event.component, event.done, event.total)
        watch(0.0)

    return follow


def _replay(bundle: Bundle, goldens: Goldens, models: TextToImage) -> Replay:
    """With the pictures in the bundle, whatever would be drawn here today."""
    pictures = pictures_for(models)
    if models.controlled:
        _refuse_missing(bundle, CONTROL_PLACE)
        pictures["control"] = read_control(Path(bundle.path, CONTROL_PLACE), None, models.size)
    canvas = None
    if goldens.canvas:
        _refuse_missing(bundle, CANVAS_PLACE, *([MASK_PLACE] if pictures["canvas"] else []))
        canvas = _read_canvas(Path(bundle.path, PLACE).parent, goldens.canvas.strength, models)
        pictures["canvas"] = replace(canvas, strength=1.0) if pictures["canvas"] else None
    return Replay(models, goldens, canvas, pictures)


def _limits(bundle: Bundle, goldens: Goldens, asked: str, arithmetics: Mapping[str, str]) -> ArithmeticLimits:
    """The limits in the goldens; today's, for an arithmetic that they do not name."""
    written = goldens.limits.arithmetics
    if asked == PROVEN and PROVEN in written:  # of schema 1, which has limits of one arithmetic
        return written[PROVEN]
    target = get_target(bundle.manifest.target.name)
    today = limits_of(target.arithmetics, [bundle.model(name).precision for name in bundle.components])
    return loosest(written.get(name, today[name]) for name in arithmetics.values())


def _refuse_missing(bundle: Bundle, *places: str) -> None:
    declared = {file.path for file in bundle.manifest.assets}
    for place in places:
        if place not in declared:
            raise BundleError(f"{place}: no such file in the manifest", hint="convert the checkpoint again")
