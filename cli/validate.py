"""diffusette validate: does a bundle still compute what PyTorch computes?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..pipeline.errors import UsageError
from .options import (
    Adapters,
    Config,
    Controlnet,
    Ema,
    Json,
    Prediction,
    Threads,
    TokenizerFolder,
    Vae,
    VaeDecoder,
    companions,
)


def validate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.", show_default=False)],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="CHECKPOINT",
            help="The checkpoint it was made from. [default: where it was converted]",
        ),
    ] = None,
    adapter: Adapters = None,
    vae: Vae = None,
    vae_decoder: VaeDecoder = None,
    controlnet: Controlnet = None,
    tokenizer: TokenizerFolder = None,
    config: Config = None,
    prediction: Prediction = None,
    ema: Ema = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also run every module by itself, and name those that go wrong.")
    ] = False,
    image: Annotated[
        bool | None,
        typer.Option(
            "--image/--no-image",
            help="Also draw whole pictures, and say what error the UNet makes at each timestep. "
            "[default: pictures where they take seconds]",
        ),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option("--prompts", metavar="N", min=1, help="With --image on the demo: captions for the oracle."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Pictures of each prompt.")] = 1,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler", metavar="NAME", help="Of the pictures, such as euler_a. [default: the checkpoint's]"
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", min=1, help="Of the pictures, as the bundle has them.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page to send: one file, works offline.")
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            "--beside",
            metavar="BUNDLE",
            help="With --layers --html: another runtime's bundle, for the map; repeat for several.",
        ),
    ] = None,
    speed: Annotated[
        bool | None,
        typer.Option("--speed/--no-speed", help="Time it for the page. [default: where that takes seconds]"),
    ] = None,
    threads: Threads = 2,
    as_json: Json = False,
) -> int:
    """Run every component of BUNDLE on inputs from PyTorch's own denoising trajectory and compare.

    Exits with 5 when one drifted past its tolerance, the worst first; with 6 when a file is damaged. On another machine
    than the one that converted, give with --reference what was given then: --adapter, --vae and so on.
    """
    from ..pipeline.bundle import open_bundle
    from ..pipeline.check import PictureChoice, check_bundle, layers_of
    from ..pipeline.measure import quick_profile
    from ..pipeline.origin import Origin
    from ..pipeline.page_file import refuse_unwritable_page, write_page
    from ..validate.page import parity_page
    from ..validate.pictures import Shown
    from .report import show_parity
    from .terminal import TerminalProgress, command_line, print_json, warn

    if html is None and speed is not None:
        raise UsageError("--speed and --no-speed are about the page", hint="add --html FILE")
    if beside and (html is None or not layers):
        raise UsageError("--beside adds columns to the page's map of layers", hint="add --layers and --html FILE")
    if html is not None:
        refuse_unwritable_page(html)
    origin = Origin(reference, companions(vae, vae_decoder, controlnet, tokenizer, config, prediction, ema, adapter))
    others = [open_bundle(other) for other in beside or ()]
    opened = open_bundle(bundle)
    shown: list[Shown] = []
    progress = TerminalProgress()
    chosen = (seeds, scheduler, steps) != (1, None, None)
    report, remarks = check_bundle(
        opened,
        reference=origin,
        image=image,
        oracle_prompts=prompts,
        choice=PictureChoice(seeds, scheduler, steps) if chosen else None,
        keep=lambda picture, drawn: shown.append(Shown(picture.prompt, picture.seed, picture.image, drawn.image)),
        layers=layers,
        timesteps=True if html is not None else None,
        threads=threads,
        progress=progress,
    )
    if html is not None:
        profile = quick_profile(opened, speed, reference=origin, threads=threads, progress=progress)
        columns = layers_of(others, reference=origin, threads=threads, progress=progress)
        page = parity_page(report.to_json(), opened.manifest, shown, profile, command_line(), columns)
        write_page(html, page)
    for remark in remarks:
        warn(remark)
    if as_json:
        print_json({"bundle": opened.manifest.name, **report.to_json()})
    else:
        show_parity(report)
        if html is not None:
            print(html)
    return 0 if report.ok else 5
