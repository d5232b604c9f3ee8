"""diffusette check-goldens: does a bundle still draw what it drew when it was made?"""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Threads


def check_goldens(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.", show_default=False)],
    threads: Threads = 2,
    as_json: Json = False,
) -> int:
    """Replay the golden vectors of BUNDLE with its own runtime: token ids, noise, every step, the picture.

    Exits with 5 when one lies past its limit, and names the first; with 6 when a file is damaged.
    """
    from ..pipeline.bundle import open_bundle
    from ..pipeline.goldens import replay_goldens
    from ..validate.golden_checks import facts_of
    from .terminal import TerminalProgress, print_json

    opened = open_bundle(bundle)
    goldens, checks = replay_goldens(opened, threads=threads, progress=TerminalProgress())
    facts = facts_of(checks, goldens)
    if as_json:
        print_json(facts)
    else:
        for check in checks:
            word = "ok    " if check.ok else "FAILED"
            note = f"  ({check.note})" if check.note else ""
            found = "equal" if check.found == inf else f"{check.found:.4g} {check.unit}"
            print(f"{word} {check.what:<32} {found}, limit {check.limit:g}{note}")
        print(f"goldens were made by {goldens.runtime}: {'all hold' if facts['ok'] else facts['first_bad'] + ' first'}")
    return 0 if facts["ok"] else 5
