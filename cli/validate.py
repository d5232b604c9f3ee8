"""diffusette validate: does a bundle still compute what PyTorch computes?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Threads


def validate(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)],
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="The checkpoint it was made from. [default: where it was converted]"),
    ] = None,
    image: Annotated[
        bool | None,
        typer.Option("--image/--no-image", help="Also draw whole pictures. [default: where that takes seconds]"),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option("--prompts", min=1, help="With --image on the demo: captions for the oracle.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Pictures of each prompt.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", help="Of the pictures, such as euler_a. [default: the checkpoint's]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Of the pictures, as the bundle has them.")
    ] = None,
    threads: Threads = 2,
    as_json: Json = False,
) -> int:
    """Run every component of BUNDLE on inputs from PyTorch's own denoising trajectory and compare.

    Exits with 5 when one drifted past its tolerance, the worst first; with 6 when a file is damaged.
    """
    from ..pipeline.bundle import open_bundle
    from ..pipeline.check import PictureChoice, check_bundle
    from .report import show_parity
    from .terminal import TerminalProgress, print_json, warn

    opened = open_bundle(bundle)
    chosen = (seeds, scheduler, steps) != (1, None, None)
    report, remarks = check_bundle(
        opened,
        reference=reference,
        image=image,
        oracle_prompts=prompts,
        choice=PictureChoice(seeds, scheduler, steps) if chosen else None,
        threads=threads,
        progress=TerminalProgress(),
    )
    for remark in remarks:
        warn(remark)
    if as_json:
        print_json({"bundle": opened.manifest.name, **report.to_json()})
    else:
        show_parity(report)
    return 0 if report.ok else 5
