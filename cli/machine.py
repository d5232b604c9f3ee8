"""diffusette machine setup|list: processors that bundles can be run on."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Json

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command("setup")
def setup(
    name: Annotated[str, typer.Argument(metavar="NAME", help="arm64: AArch64 processors, emulated.")],
    locked: Annotated[
        bool, typer.Option("--locked", help="Refuse packages that Debian has replaced since they were pinned.")
    ] = False,
) -> int:
    """Download the files of an emulated machine: 200 MB, a minute. Needs apt and pip, but not root.

    The folder is that of DIFFUSETTE_MACHINES, or the user's data folder.
    """
    from ..runtimes.machines.arm64 import NAME
    from ..runtimes.machines.install import set_up_arm64
    from ..stages.errors import UsageError
    from .terminal import TerminalProgress

    if name != NAME:
        raise UsageError(f"no machine named {name!r} can be set up", hint=f"one of: {NAME}")
    place = set_up_arm64(TerminalProgress().say, locked=locked)
    print(place)
    return 0


@app.command("list")
def list_machines(as_json: Json = False) -> int:
    """List the machines that `--machine` takes, and whether they can be used here."""
    from ..runtimes.machines.registry import known_machines
    from .terminal import print_json

    machines = known_machines()
    if as_json:
        print_json({"machines": [machine.to_json() for machine in machines]})
        return 0
    for machine in machines:
        print(f"{machine.name:<18} {machine.problem or 'ready':<28} {machine.about}")
    return 0
