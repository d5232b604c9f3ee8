"""diffusette targets: what can be converted to."""

from __future__ import annotations

from .options import Json


def targets(as_json: Json = False) -> int:
    """List the runtimes, their versions here, and the precisions and families that each really runs."""
    from ..runtimes.overview import overview
    from .terminal import print_json, print_table

    rows = overview()
    if as_json:
        print_json({"targets": rows})
        return 0
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("target", "installed", "loads with", "precisions", "families"):
        table.add_column(heading)
    for row in rows:
        installed = row["version"] or f"no: {row['missing']}"
        table.add_row(
            row["name"], installed, f">= {row['min_runtime']}", ", ".join(row["precisions"]), ", ".join(row["families"])
        )
    print_table(table)
    return 0
