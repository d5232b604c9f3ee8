"""diffusette convert: a checkpoint becomes bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..stages.artifacts import ALONE, Companions
from ..stages.disk import parse_bytes
from ..stages.errors import UsageError
from .options import Json, MachineOption, parse_size, takes_companions

if TYPE_CHECKING:
    from ..convert.conversion import Conversion
    from ..convert.search.goal import Goal


@takes_companions
def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="A diffusers folder, a single file, or the word demo.", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="Folder of the bundle; with several targets, one folder in it for each.",
        ),
    ],
    recipe: Annotated[
        str | None, typer.Option("-r", "--recipe", metavar="RECIPE", help="A shipped recipe's name, or a TOML file.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", metavar="NAME", help="ort, ncnn or mnn; repeat for several. [default: the recipe's, else all]"
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", metavar="SCHEME", help="A scheme for all components, such as fp16 or w8c_afp, or auto."
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            metavar="B",
            help="Search for a scheme for each layer, given the average bits a weight, e.g. 4.5.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", metavar="SIZE", help="Such a search, given the size of all weights together, e.g. 300MB."
        ),
    ] = None,
    min_snr: Annotated[
        float | None,
        typer.Option(
            "--min-snr",
            metavar="DB",
            help="Such a search, given the least signal-to-noise ratio of every component, in dB.",
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            "--size",
            metavar="HxW",
            help="HEIGHTxWIDTH of the pictures; repeat for several, each in its folder OUT/HEIGHTxWIDTH. "
            "[default: the checkpoint's own]",
        ),
    ] = None,
    companions: Companions = ALONE,
    goldens: Annotated[
        bool,
        typer.Option("--goldens", help="Put golden vectors into the bundles: for check-goldens, and to test a port."),
    ] = False,
    no_gate: Annotated[
        bool, typer.Option("--no-gate", help="Do not compare with PyTorch; the manifest says so.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace bundles that are already there.")] = False,
    ignore_forecast: Annotated[
        bool,
        typer.Option("--ignore-forecast", help="Start even if the forecast says that memory or disk is too small."),
    ] = False,
    record_memory: Annotated[
        bool,
        typer.Option(
            "--record-memory",
            help="Write measured memory into the manifests, whose bytes then differ from run to run.",
        ),
    ] = False,
    machine: MachineOption = None,
    as_json: Json = False,
) -> int:
    """Convert CHECKPOINT for mobile runtimes, compare each model with PyTorch, and write bundles.

    Exits with 5 when a component drifted past its tolerance; the bundle is then at OUT.rejected.
    """
    from ..convert.convert import convert as run
    from ..convert.request import Request
    from ..convert.sizes import convert_sizes
    from ..runtimes.machines.registry import machines_named
    from .report import show_conversion, show_sizes
    from .terminal import TerminalProgress, print_json, warn

    sizes = [parse_size(text) for text in size or []]
    request = Request(
        checkpoint,
        output,
        recipe=recipe,
        targets=tuple(target or ()),
        precision=precision,
        goal=_goal(bits, budget, min_snr, precision),
        size=sizes[0] if sizes else None,
        companions=companions,
        gate=not no_gate,
        goldens=goldens,
        overwrite=overwrite,
        ignore_forecast=ignore_forecast,
        record_memory=record_memory,
        machines=machines_named(machine or ()),
    )

    def convert_one(request: Request) -> Conversion:
        conversion = run(request, progress=TerminalProgress())
        for miss in conversion.misses():
            warn(f"the forecast was wrong by more than 20 %: {miss}")
        return conversion

    if len(dict.fromkeys(sizes)) > 1:
        several = convert_sizes(request, sizes, convert_one)
        if as_json:
            print_json(several.to_json())
        else:
            show_sizes(several)
        return 0 if several.ok else 5
    conversion = convert_one(request)
    if as_json:
        document: dict[str, Any] = conversion.to_json()
        print_json(document)
    else:
        show_conversion(conversion)
    return 0 if conversion.ok else 5


def _goal(bits: float | None, budget: str | None, min_snr: float | None, precision: str | None) -> Goal | None:
    """What to search for, if anything.

    Raises:
        UsageError: two goals, one that leaves nothing, or a precision for all beside it.
    """
    from ..convert.search.goal import Goal

    if bits is None and budget is None and min_snr is None:
        return None
    if precision is not None:
        raise UsageError(
            f"--precision {precision} is for all layers, a search chooses for each", hint="leave one of the two out"
        )
    return Goal(bits, None if budget is None else parse_bytes(budget, "--budget"), min_snr)
