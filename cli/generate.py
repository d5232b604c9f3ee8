"""diffusette generate: a picture from a bundle alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Threads


def generate(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="What to draw; may be empty.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file to write.")] = Path("picture.png"),
    negative: Annotated[str, typer.Option("--negative", help="What to steer away from.")] = "",
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="[default: the bundle's]")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="1 or less: none. [default: the bundle's]")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise; as torch's CPU generator.")] = 0,
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", help="ddim, euler, euler_a, dpmpp_2m, unipc, pndm. [default: the bundle's]"),
    ] = None,
    threads: Threads = 2,
    as_json: Json = False,
) -> int:
    """Draw PROMPT with the runtime and the files of BUNDLE alone, without PyTorch."""
    from ..pipeline.bundle import open_bundle
    from ..pipeline.draw import draw_with_bundle, save_drawing
    from ..runtimes.txt2img.picture import refuse_unwritable_picture
    from .terminal import TerminalProgress, print_json, warn

    refuse_unwritable_picture(output)
    opened = open_bundle(bundle)
    progress = TerminalProgress()
    drawing = draw_with_bundle(
        opened,
        prompt,
        negative=negative,
        steps=steps,
        guidance=guidance,
        seed=seed,
        scheduler=scheduler,
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
