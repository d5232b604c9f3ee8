"""The part of a page that is about layers, from the keys of `validate --layers --json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..layers.advice import advice_for

MOST: Final = 10
LARGEST: Final = 5  # results that come near float16's end
TOP_DB: Final = 160.0  # full length of a bar: a module alone may be nearly exact
REDDEST: Final = 55  # percent: figures in a cell must stay legible, in light and dark
OPEN: Final = 60  # modules up to which the map is shown without being asked for

# key in the JSON, heading of its column in the map, name of its bar
_RATIOS: Final = (
    ("snr_db", "made", "made here, fed with PyTorch's own inputs"),
    ("carried_db", "carried", "with what earlier modules carried in"),
    ("lost_db", "lost", "lost to fewer bits, against float32"),
)

Facts = Mapping[str, Any]


def layer_section(facts: Facts, target: str, beside: Mapping[str, Sequence[Facts]]) -> dict[str, Any] | None:
    """The ten worst modules with what to try, a map of all, and what comes near float16's end; None: not compared.

    A module that computes wrongly stands before one that merely loses much to its precision.

    Args:
        beside: label -> layers of further bundles of the same checkpoint, for more columns of the map.
    """
    layers: Sequence[Facts] = facts["layers"]
    if not layers:
        return None
    first = facts["first_bad"]
    bad = _name(first) if first else ""
    ratios = [ratio for ratio in _RATIOS if any(layer.get(ratio[0]) is not None for layer in layers)]
    culprit = next((each for each in layers if _name(each) == bad and not each.get("ok", True)), None)
    worst = sorted(layers, key=_harm)[:MOST]
    said = f"The first module that computes something other than PyTorch: {bad}." if bad else ""
    return {
        "words": said or "Every module computes what PyTorch computes from the same inputs.",
        "more": f"Below, the {len(worst)} that add most error.",
        "bad": bool(bad),
        "top": TOP_DB,
        "worst": [_card(layer, first, layer is culprit, ratios) for layer in worst],
        "count": len(layers),
        "open": len(layers) <= OPEN,
        "map": _map(layers, target, ratios, beside),
        "largest": _largest(facts.get("ranges", {})),
    }


def _map(
    layers: Sequence[Facts],
    target: str,
    ratios: Sequence[tuple[str, str, str]],
    beside: Mapping[str, Sequence[Facts]],
) -> dict[str, Any]:
    """Module by runtime where there are others, else module by kind of error."""
    if not beside:
        return {
            "words": f"signal over error of every module on {target}, in dB",
            "columns": [f"{target}: {ratios[0][1]}", *(heading for _, heading, _ in ratios[1:])],
            "rows": [
                {"module": _name(layer), "cells": [_cell(layer.get(key)) for key, _, _ in ratios]} for layer in layers
            ],
        }
    key = ratios[0][0]
    columns = {label: _least(found, key) for label, found in {target: layers, **beside}.items()}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return {
        "words": f"signal over error of every module ({ratios[0][2]}) on {', '.join(columns)}, in dB",
        "columns": list(columns),
        "rows": [{"module": name, "cells": [_cell(column.get(name)) for column in columns.values()]} for name in names],
    }


def _least(layers: Sequence[Facts], key: str) -> dict[str, float | None]:
    """Module -> ratio, of several tensors of one module the lowest."""
    found: dict[str, float | None] = {}
    for layer in layers:
        name, value = _name(layer), layer.get(key)
        before = found.get(name)
        found[name] = value if before is None else before if value is None else min(before, value)
    return found


def _name(layer: Facts) -> str:
    component = layer.get("component")
    return f"{component}/{layer['module']}" if component else str(layer["module"])


def _harm(layer: Facts) -> tuple[bool, float]:
    """Sorts wrong modules first, as they run; then the others by what their bits cost, or by their own error."""
    if not layer.get("ok", True):
        return False, 0.0
    found = [layer.get(key) for key in ("lost_db", "snr_db")]
    return True, next((value for value in found if value is not None), 0.0)


def _card(layer: Facts, first: Facts | None, is_first: bool, ratios: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    ok = bool(layer.get("ok", True))
    meters = []
    for key, _, label in ratios:
        value = layer.get(key)
        if value is not None:
            text = "equal" if value >= 999 else f"{value:.1f} dB"
            meters.append({"label": label, "value": max(value, 0), "text": text, "ok": ok or key != "snr_db"})
    advice = advice_for(layer["module"], layer["op"]) if ok else "Find out why the first bad module is, then run again."
    if is_first and first and first.get("try"):
        advice = f"To try: {first['try']}."
    rule = ""
    if ok and layer.get("lost_db") is not None:
        rule = layer.get("rule") or ""
    return {
        "module": _name(layer),
        "op": layer["op"],
        "ok": ok,
        "first": is_first,
        "meters": meters,
        "problem": layer.get("problem") or "",
        "advice": advice,
        "rule": rule,
    }


def _cell(value: float | None) -> dict[str, Any]:
    if value is None:
        return {"text": "", "heat": 0}
    return {"text": "=" if value >= 999 else f"{value:.0f}", "heat": heat(value)}


def heat(value: float) -> int:
    """Share of red in a cell: none at 120 dB, as good as float32; `REDDEST` at 20 dB, which is 10 % off."""
    return round(REDDEST * min(max((120 - value) / 100, 0), 1))


def _largest(ranges: Mapping[str, Sequence[Facts]]) -> list[dict[str, Any]]:
    """Results by how much of float16's range (65504) they take."""
    found = [
        (each["of_fp16"], f"{component}/{each['module']}", each) for component, rows in ranges.items() for each in rows
    ]
    found.sort(key=lambda row: -row[0])
    return [
        {
            "label": name,
            "value": share,
            "text": f"{each['peak']:.3g}, {share:.1%} of float16",
            "ok": not each.get("near", share > 0.125),
        }
        for share, name, each in found[:LARGEST]
    ]
