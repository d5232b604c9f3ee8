"""The page of `compare --html`, made from the JSON document of the same command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..pictures import Shown
from .charts import chart, mib, ms, size_text
from .page import Facts, busy_note, db, pictures_section, render


def compare_page(facts: Facts, remarks: Sequence[str], shown: Sequence[Shown], command: str) -> str:
    """Fill the page.

    Args:
        facts: `Comparison.to_json()`.
        remarks: what the user should know about how far the comparison goes.
        shown: pictures by both.
        command: the words that were typed.
    """
    a, b = facts["a"], facts["b"]
    kind = ("none", "no verdict") if not facts["gated"] else ("ok", "agree") if facts["ok"] else ("bad", "apart")
    if not facts["ok"]:
        kind = ("bad", "apart")
    return render(
        "compare.html.j2",
        title=f"{a['label']} and {b['label']}: {kind[1]}",
        verdict={"kind": kind[0], "word": kind[1], "line": contrast_line(facts)},
        remarks=remarks,
        failures=facts["failures"] if len(facts["failures"]) > 1 else [],
        sides=[
            ("A", [("label", a["label"]), *_about(a)]),
            ("B", [("label", b["label"]), *_about(b)]),
        ],
        a=a["label"],
        b=b["label"],
        components=[_card(name, part, a, b) for name, part in facts["components"].items()],
        alone=facts["alone"],
        pictures=pictures_section(facts["image"], shown, a["label"]),
        charts=_charts(facts),
        busy=busy_note(facts["busy"]),
        differences=[(row["what"], row["a"], row["b"]) for row in facts["differences"]],
        method=_method(facts, command),
    )


def contrast_line(facts: Facts) -> str:
    """The verdict in one sentence."""
    a, b = facts["a"]["label"], facts["b"]["label"]
    if not facts["ok"]:
        first, *others = facts["failures"]
        more = f", and {len(others)} more" if others else ""
        return f"{a} and {b} differ more than two sound bundles can: {first}{more}"
    least = min(part["snr_db"] for part in facts["components"].values())
    pictures = f", {db(facts['image']['psnr_db'])} in the pictures" if facts["image"] else ""
    close = "are equal" if db(least) == "equal" else f"agree to {db(least)} or better in every model"
    what = f"{a} and {b} {close}{pictures}"
    return what if facts["gated"] else f"{what}; they were made from different checkpoints"


def _about(side: Facts) -> list[tuple[str, str]]:
    return [
        ("bundle", side["name"]),
        ("runtime", f"{side['target']} {side['version']}"),
        ("precision", ", ".join(dict.fromkeys(side["precision"].values()))),
        ("models", size_text(sum(side["bytes"].values()))),
    ]


def _card(name: str, part: Facts, a: Facts, b: Facts) -> dict[str, Any]:
    meters = []
    if part["snr_db"] is not None:
        needed = part["tolerance"]
        text = db(part["snr_db"]) + (f", {needed:.1f} needed" if needed is not None else "")
        meters.append(
            {"label": "B against A", "value": part["snr_db"], "needed": needed, "text": text, "ok": part["ok"]}
        )
    precision = " against ".join(dict.fromkeys((a["precision"][name], b["precision"][name])))
    largest = f"largest difference {part['max_abs']:.2g}; " if part["max_abs"] is not None else ""
    note = part["problem"] or f"{largest}worst of {part['probes']} inputs at {part['worst_probe']}"
    return {"name": name, "ok": part["ok"], "meters": meters, "note": f"{precision}; {note}"}


def _charts(facts: Facts) -> list[dict[str, Any]]:
    a, b, names = facts["a"], facts["b"], list(facts["components"])
    sizes = [{name: side["bytes"][name] for name in names} for side in (a, b)]
    note = f"named bars: {a['label']}"
    found = [chart("Size", "on disk", sizes[0], size_text, note, sizes[1], b["label"])]
    for title, unit, key, text in (
        ("Speed", "one run, milliseconds", "median_ms", ms),
        ("Memory", "peak, one model alone", "peak_rss_mib", mib),
    ):
        if speed := facts["speed"]:
            sides = [{name: speed[name][side][key] for name in names} for side in ("a", "b")]
            found.append(chart(title, unit, sides[0], text, note, sides[1], b["label"]))
    return found


def _method(facts: Facts, command: str) -> list[tuple[str, str]]:
    rows = [
        ("inputs", "calls of the pictures that A draws, the same for both; PyTorch is not involved"),
        ("SNR", "10·log10(Σa² / Σ(a - b)²), a and b being the answers of A and B"),
    ]
    if facts["speed"]:
        one = next(iter(facts["speed"].values()))["a"]
        rows.append(("speed", f"both take turns, run by run; median of {one['runs']}, {one['threads']} threads"))
    rows += [
        (name, f"{part['tolerance']:.1f} dB: {part['why']}")
        for name, part in facts["components"].items()
        if part["why"]
    ]
    return [*rows, ("command", command)]
