"""Bars of size, speed and memory, as the templates of pages take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...bundle.manifest import Manifest


def bundle_charts(manifest: Manifest, profile: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Size, memory and, where it was measured or is recorded, speed."""
    measured: Mapping[str, Any] = profile["components"] if profile else {}
    parts = manifest.components
    sizes = {name: sum(file.bytes for file in part.files) for name, part in parts.items()}
    plain = {name: sizes[name] * 32 / part.bits_per_weight for name, part in parts.items()}
    found = [chart("Size", "on disk", sizes, size_text, f"in float32 about {size_text(sum(plain.values()))} in all")]
    if measured:
        ours = {name: part["median_ms"] for name, part in measured.items()}
        theirs = {name: part["torch"]["median_ms"] for name, part in measured.items() if part["torch"]}
        found.append(chart("Speed", "one run, milliseconds", ours, ms, "", theirs, "PyTorch"))
    elif manifest.speed:
        ratios = {name: entry.ratio_to_fp32 for name, entry in manifest.speed.items()}
        found.append(chart("Speed", "time against float32 here", ratios, lambda ratio: f"{ratio:.2f}x"))
    if measured:
        peaks = {name: part["peak_rss_mib"] for name, part in measured.items()}
        theirs = {name: part["torch"]["peak_rss_mib"] for name, part in measured.items() if part["torch"]}
        found.append(chart("Memory", "peak, one model alone", peaks, mib, "", theirs, "PyTorch"))
    elif memory := (manifest.memory.measured or manifest.memory.forecast):
        word = "as measured" if manifest.memory.measured else "a forecast, not measured"
        found.append(chart("Memory", "peak, one model alone", dict(memory), mib, word))
    return found


def chart(
    title: str,
    unit: str,
    values: Mapping[Any, float],
    text: Callable[[float], str],
    note: str = "",
    others: Mapping[Any, float] | None = None,
    rival: str = "",
) -> dict[str, Any]:
    """Bars, two a name where `others` has one too, of whom `rival` is the name."""
    others = others or {}
    rows = []
    for name, value in values.items():
        rows.append({"label": name, "value": value, "text": text(value), "kind": ""})
        if name in others:
            rows.append({"label": rival, "value": others[name], "text": text(others[name]), "kind": "second"})
    top = max([*values.values(), *others.values()])
    return {"title": title, "unit": unit, "bars": rows, "top": top, "note": note}


def size_text(number: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:.3g} {unit}"


def ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def mib(value: float) -> str:
    return f"{value:.0f} MiB"
