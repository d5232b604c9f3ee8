"""Plots as SVG that stands inside a page: its colours are the page's own, so it follows light and dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-ins that matplotlib accepts as colours; the page has CSS variables in their place.
_INK, _FAINT, _LINE, _OTHER, _LIMIT = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES: Final = {_INK: "muted", _FAINT: "rule", _LINE: "accent", _OTHER: "second", _LIMIT: "bad"}

_SIZE: Final = (5.0, 2.9)  # inches at 72 dpi: about a phone's width, so that text there is of its nominal size
TOP_DB: Final = 160.0
"""Where a drift of "equal" is drawn: float32 pictures never reach it otherwise."""


def drift_plot(drift: Mapping[str, Sequence[float]], worst: Sequence[float], name: str) -> str:
    """SNR of the latents against the step.

    Args:
        drift: label -> dB after each step, a thin line each.
        worst: dB after each step of the worst, the thick line.
        name: says what is shown, for those who cannot see it.
    """
    from matplotlib.ticker import MaxNLocator

    steps = range(1, len(worst) + 1)
    with _axes(name) as (axes, done):
        for values in drift.values():
            axes.plot(steps, [min(value, TOP_DB) for value in values], color=_OTHER, linewidth=1, alpha=0.7)
        axes.plot(steps, [min(value, TOP_DB) for value in worst], color=_LINE, linewidth=2.2)
        axes.set_xlabel("step")
        axes.set_ylabel("SNR of latents, dB")
        axes.set_xlim(1, max(2, len(worst)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        low, high = axes.get_ylim()
        if high - low < 20:
            axes.set_ylim((low + high) / 2 - 10, (low + high) / 2 + 10)
        axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    return done()


def timesteps_plot(
    times: Sequence[float], calls: Sequence[Sequence[float]], worst: Sequence[float], same: Sequence[float], name: str
) -> str:
    """SNR of the UNet's answer against the timestep, noise on the left, as a picture is drawn.

    Args:
        times: the timesteps.
        calls: dB at each of `times`, a thin line each.
        worst: dB of the worst call, the thick line.
        same: dB against PyTorch with equally rounded weights, the dashed line; empty for a model at float32.
        name: says what is shown, for those who cannot see it.
    """
    mark = "o" if len(times) < 8 else ""
    with _axes(name) as (axes, done):
        for values in calls:
            axes.plot(times, _shown(values), color=_LINE, linewidth=0.8, alpha=0.35)
        axes.plot(times, _shown(worst), color=_LINE, linewidth=2.2, marker=mark, label="PyTorch, float32")
        if same:
            dashes: Any = (0, (4, 2))
            line = {"color": _OTHER, "linewidth": 2.2, "linestyle": dashes, "marker": mark}
            axes.plot(times, _shown(same), label="the same rounded weights", **line)
            axes.figure.legend(loc="outside upper left", ncols=2, frameon=False)
        axes.set_ylabel("SNR of one call, dB")
        _towards_the_picture(axes, times)
        low, high = axes.get_ylim()
        if high - low < 20:
            axes.set_ylim((low + high) / 2 - 10, (low + high) / 2 + 10)
    return done()


def bits_plot(times: Sequence[float], middle: Sequence[float], least: Sequence[float], name: str) -> str:
    """Bits that layers use of 8 against the timestep: the median layer thick, the least one dashed."""
    with _axes(name) as (axes, done):
        axes.plot(times, middle, color=_LINE, linewidth=2.2, label="median layer")
        axes.plot(times, least, color=_OTHER, linewidth=2.2, linestyle=(0, (4, 2)), label="least layer")
        axes.figure.legend(loc="outside upper left", ncols=2, frameon=False)
        axes.set_ylabel("bits used of 8")
        axes.set_ylim(0, 8.3)
        _towards_the_picture(axes, times)
    return done()


def _towards_the_picture(axes: Axes, times: Sequence[float]) -> None:
    """Timesteps along the x axis as a picture meets them: from noise to the last."""
    axes.set_xlabel("timestep (noise is left, the picture right)")
    if len(times) > 1:
        axes.set_xlim(max(times), min(times))
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)


def _shown(values: Sequence[float]) -> list[float]:
    return [min(value, TOP_DB) for value in values]


def histogram_plot(edges: Sequence[float], counts: Sequence[float], name: str) -> str:
    """Share of channel values a bin of difference; `edges` in levels of an 8-bit picture."""
    total = sum(counts) or 1
    with _axes(name) as (axes, done):
        axes.bar(range(len(counts)), [100 * count / total for count in counts], width=0.86, color=_LINE)
        axes.set_xticks([x - 0.5 for x in range(1, len(counts))])
        axes.set_xticklabels([f"{edge:g}" if place % 2 == 0 else "" for place, edge in enumerate(edges[1:-1])])
        visible = next((index for index, edge in enumerate(edges) if edge >= 1), len(counts))
        axes.axvline(visible - 0.5, color=_LIMIT, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlabel("difference, in levels of 255")
        axes.set_ylabel("% of channel values")
        axes.set_ylim(0, 105)
        axes.set_xlim(-0.6, len(counts) - 0.4)
        axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    return done()


@contextmanager
def _axes(name: str) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Axes in the page's colours, and a function that gives the SVG once the block has drawn."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text, in the page's font
        "svg.hashsalt": name,  # the ids of two plots must differ, and those of one plot must not change
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "ytick.left": False,
        **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), _INK),
    }
    svg = io.StringIO()
    with rc_context(style):
        figure = Figure(figsize=_SIZE, layout="constrained")
        canvas = FigureCanvasSVG(figure)
        yield figure.add_subplot(), lambda: _inlined(svg.getvalue(), name)
        bare: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.print_svg(svg, metadata=bare)  # type: ignore[no-untyped-call]


def _inlined(svg: str, name: str) -> str:
    """The `<svg>` element alone, scalable, with a name, without ids that two plots would share."""
    body = svg[svg.index("<svg") :]
    size = re.search(r'viewBox="([^"]+)"', body)
    if size is None:
        raise AssertionError("matplotlib writes a viewBox")
    inner = body[body.index(">") + 1 :]
    inner = re.sub(r"<metadata>.*?</metadata>", "", inner, flags=re.DOTALL)
    inner = re.sub(r'<g id="(?:figure|patch|axes|matplotlib|xtick|ytick|text|line2d)[^"]*"', "<g", inner)
    inner = re.sub(r"<defs>\s*<style.*?</defs>", "", inner, count=1, flags=re.DOTALL)
    inner = re.sub(r"font-family: [^;\"]*", "font-family: inherit", inner)
    for colour, variable in _VARIABLES.items():
        inner = inner.replace(colour, f"var(--{variable})")
    inner = inner.replace("fill: #ffffff", "fill: none")
    head = f'<svg viewBox="{size[1]}" role="img" xmlns="http://www.w3.org/2000/svg" '
    head += f'xmlns:xlink="http://www.w3.org/1999/xlink" class="plot"><title>{html.escape(name)}</title>'
    return head + inner
