"""The menu of a search as a picture: quality over size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .goal import Found


def plot_frontier(found: Found, file: Path) -> None:
    """Write `file` (PNG): image PSNR and the UNet's SNR over bits a weight, the chosen mixture marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    bits = [row.bits for row in found.menu]
    lines: dict[str, list[float]] = {}
    if all(row.psnr_db is not None for row in found.menu):
        lines["pictures, PSNR (median)"] = [row.psnr_db or 0.0 for row in found.menu]
    for part in found.menu[0].snr_db:
        lines[f"{part}, SNR"] = [row.snr_db[part] for row in found.menu]
    for index, (label, values) in enumerate(lines.items()):
        first = index == 0
        axes.plot(bits, values, marker="o", linewidth=2.4 if first else 1.2, markersize=6 if first else 4, label=label)
    for row, value in zip(found.menu, next(iter(lines.values())), strict=True):
        if row.chosen:
            axes.axvline(row.bits, color="0.6", linestyle="--", linewidth=1)
            axes.annotate(
                f"chosen: {row.bits:.2f} bits\n{row.bytes / 1e6:.2f} MB, {value:.1f} dB",
                (row.bits, value),
                xytext=(10, -28),
                textcoords="offset points",
                fontsize=9,
            )
    if found.tuned and found.tuned.psnr_db is not None:
        label = f"scales tuned, as built: {found.tuned.psnr_db:.1f} dB"
        axes.plot(found.tuned.bits, found.tuned.psnr_db, marker="*", markersize=13, linestyle="none", label=label)
    axes.set_xlabel("bits a weight, scales and biases included")
    axes.set_ylabel("dB against PyTorch in float32")
    axes.set_title(f"{found.goal} on {found.target}: what more bits buy", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(
        str(file), format="png", metadata={"Software": None}
    )  # no version in it: equal menus are equal files
