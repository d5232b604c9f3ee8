"""diffusette cache ls|verify|prune."""

from __future__ import annotations

from typing import Annotated

import typer

from ..stages.disk import parse_bytes
from .options import Json

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command("ls")
def ls(as_json: Json = False) -> int:
    """List finished stages, the least recently used first."""
    from ..stages.cache import SHORT, Cache
    from .terminal import print_json, size_text

    cache = Cache.default()
    with cache.used():
        entries = cache.entries()
    total = sum(entry.bytes for entry in entries)
    if as_json:
        rows = [{"digest": entry.digest, "stage": entry.label, "bytes": entry.bytes} for entry in entries]
        print_json({"folder": str(cache.root), "bytes": total, "entries": rows})
        return 0
    for entry in entries:
        print(f"{entry.digest[:SHORT]}  {size_text(entry.bytes):>8}  {entry.label}")
    print(f"{len(entries)} stages, {size_text(total)}, in {cache.root}")
    return 0


@app.command("verify")
def verify(as_json: Json = False) -> int:
    """Read every byte of the cache and remove damaged stages, which are then built again. Exits with 6 if any was."""
    from ..stages.cache import SHORT, Cache
    from ..stages.errors import BundleError
    from .terminal import print_json

    cache = Cache.default()
    with cache.used():
        total = len(cache.entries())
        bad = list(cache.damaged())
    if not as_json:  # before the removal, which a running conversion may forbid
        for entry, problem in bad:
            print(f"{entry.digest[:SHORT]}  {entry.label}: {problem}")
    if bad:
        with cache.used(alone=True):
            for entry, _ in bad:
                cache.remove(entry)
    if as_json:
        rows = [{"digest": entry.digest, "stage": entry.label, "problem": problem} for entry, problem in bad]
        print_json({"ok": not bad, "checked": total, "removed": rows})
    else:
        print(f"{total} stages checked, {len(bad)} damaged" + (" and removed" if bad else ""))
    return BundleError.exit_code if bad else 0


@app.command("prune")
def prune(
    keep: Annotated[
        str, typer.Option("--keep", metavar="SIZE", help="Bytes to keep, the most recently used first, e.g. 20GB.")
    ] = "0",
    as_json: Json = False,
) -> int:
    """Delete the least recently used stages until at most --keep remains; without --keep, all of them."""
    from ..stages.cache import Cache
    from .terminal import print_json, size_text

    gone = Cache.default().prune(parse_bytes(keep, "--keep"))
    freed = sum(entry.bytes for entry in gone)
    if as_json:
        print_json({"removed": [entry.digest for entry in gone], "bytes": freed})
    else:
        print(f"{len(gone)} stages removed, {size_text(freed)} freed")
    return 0
