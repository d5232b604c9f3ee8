"""diffusette profile: how fast, how large."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..stages.artifacts import ALONE, Companions
from ..stages.errors import UsageError
from .options import Json, Threads, takes_companions


@takes_companions
def profile(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.", show_default=False)],
    runs: Annotated[
        int, typer.Option("--runs", metavar="N", min=1, help="Timed runs of each component, after one to warm up.")
    ] = 5,
    threads: Threads = 2,
    versus: Annotated[
        str | None,
        typer.Option("--vs", metavar="torch", help="torch: also time PyTorch eager, in turns with the runtime."),
    ] = None,
    ops: Annotated[bool, typer.Option("--ops", help="Also time every operation of the runtime's graph.")] = False,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="CHECKPOINT",
            help="The checkpoint, for --vs torch and --ops. [default: where it was converted]",
        ),
    ] = None,
    companions: Companions = ALONE,
    form: Annotated[
        str | None, typer.Option("--form", metavar="FORM", help="Another form of the models, such as ort.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Measure each component of BUNDLE in a process of its own: latency, load time, peak memory, size on disk.

    With --vs torch or --ops on another machine than the one that converted, give with --reference what was given then.
    """
    from ..bundle.bundle import open_bundle
    from ..stages.extras import require_converter
    from ..validate.reference.origin import Origin
    from ..validate.speed.measure import busy, measure_bundle
    from ..validate.speed.measure_ops import profile_ops
    from .report import show_profile
    from .terminal import TerminalProgress, print_json, warn

    if versus not in (None, "torch"):
        raise UsageError(f"--vs {versus!r} is not known", hint="--vs torch")
    if versus or reference:
        require_converter("a measurement beside the checkpoint")
    opened, progress = open_bundle(bundle), TerminalProgress()
    origin = Origin(reference, companions)
    report = measure_bundle(
        opened,
        runs=runs,
        threads=threads,
        versus_torch=versus == "torch",
        reference=origin,
        form=form,
        progress=progress,
    )
    if ops:
        report = replace(
            report,
            ops=profile_ops(opened, runs=runs, threads=threads, reference=origin, form=form, progress=progress),
        )
    if (load := busy()) is not None:
        warn(f"the machine was busy with other work (load {load:.1f}): trust ratios more than milliseconds")
    if as_json:
        print_json(report.to_json())
    else:
        show_profile(report)
    return 0
