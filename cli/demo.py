"""diffusette demo: the whole tool on the embedded checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="Folder for the bundles and pictures.")
    ] = Path("demo-out"),
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What the three runtimes draw.")] = (
        "a large red star in the center, on a blue background"
    ),
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the noise.")] = 7,
) -> int:
    """Convert the embedded checkpoint for every runtime, compare, profile, and draw one picture with each."""
    from ..bundle.bundle import open_bundle
    from ..bundle.draw import draw_with_bundle, save_drawing
    from ..convert.convert import convert_checkpoint
    from ..runtimes.registry import TARGETS
    from ..validate.speed.measure import busy, measure_bundles
    from .report import show_conversion, show_profile
    from .terminal import TerminalProgress, warn

    for name in TARGETS:
        _refuse_others_bundle(output / name)
    progress = TerminalProgress()
    progress.say("1. convert: one checkpoint, three runtimes, each compared with PyTorch")
    conversion = convert_checkpoint("demo", output, targets=tuple(TARGETS), progress=progress, overwrite=True)
    show_conversion(conversion)
    if not conversion.ok:
        return 5
    progress.say("\n2. profile: next to PyTorch eager, run by run")
    bundles = [open_bundle(output / name) for name in TARGETS]
    reports = measure_bundles(bundles, versus_torch=True, runs=10, progress=progress)
    for report in reports:
        show_profile(report, explained=report is reports[-1])
    if (load := busy()) is not None:
        warn(f"the machine was busy with other work (load {load:.1f}): its times say little")
    progress.say(f"\n3. generate: {prompt!r}, seed {seed}, by each bundle alone")
    for name, bundle in zip(TARGETS, bundles, strict=True):
        drawing = draw_with_bundle(bundle, prompt, seed=seed, progress=progress)
        save_drawing(drawing, bundle, output / f"{name}.png")
        print(output / f"{name}.png")
    return 0


def _refuse_others_bundle(place: Path) -> None:
    """Raise UsageError if `place` holds a bundle of another checkpoint; the demo replaces its own bundles only."""
    from ..bundle.bundle import open_bundle
    from ..bundle.manifest import MANIFEST
    from ..stages.errors import UsageError

    if (place / MANIFEST).is_file() and (found := open_bundle(place).manifest.name) != "demo":
        raise UsageError(
            f"{place} holds a bundle of {found!r}, which the demo would replace", hint="choose another folder with -o"
        )
