"""A picture from a bundle alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..export.compiled_schedule import CompiledSchedule
from ..runtimes.txt2img.canvas import Canvas
from ..runtimes.txt2img.control import Control
from ..runtimes.txt2img.generate import Drawing, draw
from ..runtimes.txt2img.generate import Progress as Event
from ..runtimes.txt2img.picture import write_picture
from ..stages.progress import Progress, Silent
from .bundle import Bundle
from .sessions import painter


def draw_with_bundle(
    bundle: Bundle,
    prompt: str,
    *,
    negative: str = "",
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    scheduler: str | None = None,
    canvas: Canvas | None = None,
    control: Control | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> Drawing:
    """Draw `prompt` with the bundle's runtime, its tokenizer and a compiled schedule; see `txt2img.generate`.

    Raises:
        UsageError: the bundle carries no such schedule.
        BundleError: a file of the bundle has changed since it was made.
    """
    progress = progress or Silent()
    bundle.refuse_damage()
    schedule = bundle.schedule(scheduler, steps)
    if canvas is not None and canvas.strength < 1 and scheduler is None and schedule.history > 1:
        schedule = _single_step(bundle, schedule)
    with progress.running("drawing") as watch:

        def follow(event: Event) -> None:
            progress.advance(event.component, event.done, event.total)
            watch(0.0)

        return draw(
            painter(bundle, schedule, threads),
            prompt,
            negative,
            guidance=guidance,
            seed=seed,
            canvas=canvas,
            control=control,
            watch=follow,
        )


def _single_step(bundle: Bundle, wanted: CompiledSchedule) -> CompiledSchedule:
    """A schedule of as many steps that can start in its middle; `wanted`, which cannot, where there is none."""
    fitting = (each for each in bundle.schedules() if each.steps == wanted.steps and each.history == 1)
    return next(fitting, wanted)


def save_drawing(drawing: Drawing, bundle: Bundle, file: Path) -> dict[str, Any]:
    """Write the PNG; return what `generate --json` prints."""
    import hashlib

    write_picture(drawing, file)
    return {
        "ok": True,
        "file": str(file),
        "target": bundle.manifest.target.name,
        "prompt": drawing.prompt,
        "negative": drawing.negative,
        "seed": drawing.seed,
        "steps": drawing.steps,
        "scheduler": drawing.scheduler,
        "guidance": drawing.guidance,
        "control_scale": drawing.control_scale,
        "size": list(drawing.image.shape[:2]),
        "sha256_of_float_image": hashlib.sha256(drawing.image.tobytes()).hexdigest(),
        "warnings": list(drawing.warnings),
    }
