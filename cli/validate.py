"""diffusette validate: does a bundle still compute what PyTorch computes?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..stages.artifacts import ALONE, Companions
from ..stages.errors import UsageError
from .options import Json, MachineOption, Threads, takes_companions

if TYPE_CHECKING:
    from ..validate.reference.origin import Origin


@takes_companions
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
    companions: Companions = ALONE,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also run every module by itself, and name those that are wrong.")
    ] = False,
    image: Annotated[
        bool | None,
        typer.Option(
            "--image/--no-image",
            help="Also draw whole pictures, and measure the UNet's error at each timestep. "
            "[default: only pictures, if they take seconds]",
        ),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(
            "--prompts",
            metavar="N",
            min=1,
            help="For the demo, with --image or --machine: captions that the oracle grades.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Pictures of each prompt.")] = 1,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            metavar="NAME",
            help="Scheduler of the pictures, such as euler_a. [default: the checkpoint's]",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", min=1, help="Steps of the pictures; the bundle must have that schedule."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the report as one HTML file that works offline."),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            "--beside",
            metavar="BUNDLE",
            help="With --layers --html: a bundle for another runtime, as a column of the map; repeat for several.",
        ),
    ] = None,
    speed: Annotated[
        bool | None,
        typer.Option(
            "--speed/--no-speed", help="Time the components for the page. [default: if it takes only seconds]"
        ),
    ] = None,
    machine: MachineOption = None,
    arithmetic: Annotated[
        list[str] | None,
        typer.Option(
            "--arithmetic",
            metavar="NAME",
            help="With --machine: only this arithmetic, such as fp16; repeat for several. [default: all]",
        ),
    ] = None,
    calls: Annotated[
        int | None,
        typer.Option("--calls", metavar="N", min=1, help="With --machine: UNet calls to compare. [default: 8, or 1]"),
    ] = None,
    threads: Threads = 2,
    as_json: Json = False,
) -> int:
    """Run every component of BUNDLE on inputs from PyTorch's denoising trajectory, and compare with PyTorch.

    Exits with 5 when a component drifted past its tolerance, and lists the worst first; with 6 when a file is damaged.
    On a machine other than the one that converted, give --reference and the options of the conversion (--adapter, --vae
    and so on).
    """
    from ..bundle.bundle import open_bundle
    from ..validate.check import PictureChoice, check_bundle, layers_of
    from ..validate.pages.page import parity_page
    from ..validate.pages.page_file import refuse_unwritable_page, write_page
    from ..validate.pictures import Shown
    from ..validate.reference.origin import Origin
    from ..validate.speed.measure import quick_profile
    from .report import show_parity
    from .terminal import TerminalProgress, command_line, print_json, warn

    if machine:
        _refuse_beside_machine({"--layers": layers, "--html": html, "--scheduler": scheduler})
        origin = Origin(reference, companions)
        return _on_machines(bundle, machine, origin, image, arithmetic or (), calls, prompts, threads, as_json)
    if arithmetic or calls:
        raise UsageError("--arithmetic and --calls are about another machine", hint="add --machine arm64")
    if html is None and speed is not None:
        raise UsageError("--speed and --no-speed are about the page", hint="add --html FILE")
    if beside and (html is None or not layers):
        raise UsageError("--beside adds columns to the page's map of layers", hint="add --layers and --html FILE")
    if html is not None:
        refuse_unwritable_page(html)
    origin = Origin(reference, companions)
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


def _refuse_beside_machine(given: dict[str, object]) -> None:
    """Options that say nothing about another machine."""
    if wrong := [name for name, value in given.items() if value]:
        raise UsageError(f"{wrong[0]} is not measured on another machine", hint="leave out --machine, or that option")


def _on_machines(
    place: Path,
    names: list[str],
    reference: Origin,
    image: bool | None,
    arithmetics: Sequence[str],
    calls: int | None,
    prompts: int | None,
    threads: int,
    as_json: bool,
) -> int:
    from ..bundle.bundle import open_bundle
    from ..runtimes.machines.registry import machines_named
    from ..validate.machines.check import check_on_machines
    from .report import show_machines
    from .terminal import TerminalProgress, print_json

    machines = machines_named(names)
    opened = open_bundle(place)
    reports = check_on_machines(
        opened,
        machines,
        reference=reference,
        image=image,
        arithmetics=arithmetics,
        calls=calls,
        oracle_prompts=prompts,
        threads=threads,
        progress=TerminalProgress(),
    )
    ok = all(report.ok for report in reports)
    if as_json:
        machines_json = [report.to_json() for report in reports]
        print_json({"bundle": opened.manifest.name, "ok": ok, "machines": machines_json})
    else:
        show_machines(reports)
    return 0 if ok else 5
