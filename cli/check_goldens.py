"""diffusette check-goldens: does a bundle still draw what it drew when it was made?"""

from __future__ import annotations

from math import isinf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Json, Threads

if TYPE_CHECKING:
    from ..validate.goldens.checks import Check


def check_goldens(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.", show_default=False)],
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine",
            metavar="NAME",
            help="Run the models on another processor: arm64 or arm64:PROCESSOR (emulated), vulkan or native.",
        ),
    ] = None,
    arithmetic: Annotated[
        str | None,
        typer.Option(
            "--arithmetic",
            metavar="NAME",
            help="The arithmetic of every component, such as fp16. [default: the one it was proven in]",
        ),
    ] = None,
    threads: Threads = 2,
    as_json: Json = False,
) -> int:
    """Replay the golden vectors of BUNDLE with its own runtime: token ids, noise, every step, the picture.

    First the code between the models is checked, to float32's rounding: golden answers stand in for the models. Then
    the models are checked, within the limits of their arithmetic. Exits with 5 when a value is past its limit, and
    names the first; with 6 when a file is damaged.
    """
    from ..bundle.bundle import open_bundle
    from ..runtimes.arithmetic import PROVEN
    from ..runtimes.machines.machine import HERE
    from ..runtimes.machines.registry import machine_named
    from ..validate.goldens.checks import facts_of
    from ..validate.goldens.of_bundle import replay_goldens
    from .terminal import TerminalProgress, print_json

    where = machine_named(machine) if machine else HERE
    replayed = replay_goldens(
        open_bundle(bundle),
        machine=where,
        arithmetic=arithmetic or PROVEN,
        threads=threads,
        progress=TerminalProgress(),
    )
    goldens = replayed.goldens
    facts = facts_of(replayed.checks, goldens, replayed.arithmetics, replayed.machine)
    if as_json:
        print_json(facts)
    else:
        for check in replayed.checks:
            print(_line(check))
        names = ", ".join(dict.fromkeys(replayed.arithmetics.values()))
        place = f"on {replayed.machine}" if machine else "here"
        verdict = "all hold" if facts["ok"] else f"{facts['first_bad']} first"
        print(f"goldens were made by {goldens.runtime}, replayed in {names} {place}: {verdict}")
    return 0 if facts["ok"] else 5


def _line(check: Check) -> str:
    word = "ok    " if check.ok else "FAILED"
    notes = [*(["golden answers"] if check.golden_answers else []), *([check.note] if check.note else [])]
    found = "equal" if isinf(check.found) else f"{check.found:.4g} {check.unit}"
    return f"{word} {check.what:<32} {found}, limit {check.limit:g}" + (f"  ({'; '.join(notes)})" if notes else "")
