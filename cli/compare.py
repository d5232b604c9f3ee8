"""diffusette compare: two bundles on the same inputs, in one table and one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Threads


def compare(
    first: Annotated[Path, typer.Argument(help="A bundle's folder; its answers are the reference.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="The bundle to compare with it.", metavar="B")],
    image: Annotated[
        bool | None,
        typer.Option("--image/--no-image", help="Draw pictures with both. [default: if it takes only seconds]"),
    ] = None,
    speed: Annotated[
        bool | None,
        typer.Option("--speed/--no-speed", help="Time both, in turns. [default: if it takes only seconds]"),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the report as one HTML file that works offline."),
    ] = None,
    threads: Threads = 2,
    as_json: Json = False,
) -> int:
    """Compare two bundles on the same inputs: two runtimes, two precisions, before and after an upgrade.

    Inputs come from the pictures that A draws, so neither PyTorch nor the checkpoint is needed. Exits with 5 when the
    bundles differ more than two bundles can that both pass their gates. For bundles of different checkpoints there is
    a warning and no verdict.
    """
    from ..bundle.bundle import open_bundle
    from ..stages.extras import require_converter
    from ..validate.compare import compare_bundles
    from ..validate.pages.compare_page import compare_page
    from ..validate.pages.page_file import refuse_unwritable_page, write_page
    from ..validate.pictures import Shown
    from .report import show_comparison
    from .terminal import TerminalProgress, command_line, print_json, warn

    if html is not None:
        require_converter("the page of --html")
        refuse_unwritable_page(html)
    one, two = open_bundle(first), open_bundle(second)
    shown: list[Shown] = []
    found, remarks = compare_bundles(
        one,
        two,
        image=image,
        speed=speed,
        threads=threads,
        keep=lambda picture, drawn: shown.append(Shown(picture.prompt, picture.seed, picture.image, drawn.image)),
        progress=TerminalProgress(),
    )
    if html is not None:
        write_page(html, compare_page(found.to_json(), remarks, shown, command_line()))
    for remark in remarks:
        warn(remark)
    if found.busy is not None:
        warn(f"the machine was busy with other work (load {found.busy:.1f}): trust ratios more than milliseconds")
    if as_json:
        print_json({**found.to_json(), "remarks": remarks})
    else:
        show_comparison(found)
        if html is not None:
            print(html)
    return 0 if found.ok else 5
