"""What the registered runtimes are and can do, as plain rows for tables, docs and JSON."""

from __future__ import annotations

from typing import Any

from ..stages.errors import MissingTool
from .registry import TARGETS, get_target


def overview() -> list[dict[str, Any]]:
    """A row a target: name, version (None when it is not installed, then `missing` says why), what it runs."""
    rows = []
    for name in TARGETS:
        target = get_target(name)
        row: dict[str, Any] = {
            "name": name,
            "version": None,
            "missing": None,
            "min_runtime": target.min_runtime,
            "precisions": list(target.precisions),
            "low_rank": target.low_rank,
            "families": list(target.families),
        }
        try:
            target.require()
            row["version"] = target.version()
        except MissingTool as error:
            row["missing"] = error.what
        rows.append(row)
    return rows
