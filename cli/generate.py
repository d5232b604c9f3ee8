"""diffusette generate: a picture from a bundle alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Threads


def generate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.", show_default=False)],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw; may be empty.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="PNG file to write.")] = Path(
        "picture.png"
    ),
    negative: Annotated[str, typer.Option("--negative", metavar="TEXT", help="What to steer away from.")] = "",
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", min=1, help="Steps of the schedule. [default: the bundle's]")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", metavar="G", help="Guidance scale; 1 or less turns it off. [default: the bundle's]"),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Seed of the noise, as PyTorch's CPU generator takes it.")
    ] = 0,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            metavar="NAME",
            help="ddim, euler, euler_a, dpmpp_2m, unipc, pndm, lcm, tcd. [default: the bundle's]",
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", metavar="FILE", help="Picture to start from.")] = None,
    mask: Annotated[
        Path | None,
        typer.Option("--mask", metavar="FILE", help="For inpainting models: white is redrawn, black is kept."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength", metavar="S", help="How far from --image, above 0 to 1. [default: 0.8; 1 with --mask]"
        ),
    ] = None,
    control: Annotated[
        Path | None,
        typer.Option("--control", metavar="FILE", help="For a bundle with a ControlNet: the control picture."),
    ] = None,
    control_scale: Annotated[
        float | None,
        typer.Option(
            "--control-scale", metavar="S", help="How strongly --control steers; 0 turns it off. [default: 1]"
        ),
    ] = None,
    threads: Threads = 2,
    as_json: Json = False,
) -> int:
    """Draw PROMPT with the runtime and the files of BUNDLE alone, without PyTorch."""
    from ..bundle.bundle import open_bundle
    from ..bundle.draw import draw_with_bundle, save_drawing
    from ..runtimes.txt2img.canvas import read_canvas
    from ..runtimes.txt2img.control import read_control
    from ..runtimes.txt2img.picture import refuse_unwritable_picture
    from ..stages.errors import UsageError
    from .terminal import TerminalProgress, print_json, warn

    refuse_unwritable_picture(output)
    if image is None and (mask is not None or strength is not None):
        raise UsageError("--mask and --strength go with --image", hint="add --image FILE")
    opened = open_bundle(bundle)
    canvas = read_canvas(image, mask, strength, opened.manifest.size) if image is not None else None
    steering = read_control(control, control_scale, opened.manifest.size)
    progress = TerminalProgress()
    drawing = draw_with_bundle(
        opened,
        prompt,
        negative=negative,
        steps=steps,
        guidance=guidance,
        seed=seed,
        scheduler=scheduler,
        canvas=canvas,
        control=steering,
        threads=threads,
        progress=progress,
    )
    for text in drawing.warnings:
        warn(text)
    facts = save_drawing(drawing, opened, output)
    if as_json:
        print_json(facts)
    else:
        print(output)
    return 0
