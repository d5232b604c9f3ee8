"""The UNet's error timestep by timestep, as a page shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..parity import EXACT_DB
from .plots import bits_plot, timesteps_plot

Facts = Mapping[str, Any]


def timestep_section(curve: Facts | None) -> list[dict[str, str]]:
    """The plots, each with a title and words, from `TimestepCurve.to_json()`; none where nothing was measured."""
    if curve is None or not curve["points"]:
        return []
    found = [_errors(curve)]
    if activations := curve["activations"]:
        found.append(_bits(activations))
    return found


def _errors(curve: Facts) -> dict[str, str]:
    points = curve["points"]
    times = [point["timestep"] for point in points]
    worst = [point["snr_db"] for point in points]
    same = [point["same_weights_db"] for point in points if point["same_weights_db"] is not None]
    calls = [point["calls_db"] for point in points]
    even = len({len(each) for each in calls}) == 1  # a solver that asks a timestep twice has no line a prompt
    lowest = min(points, key=lambda point: point["snr_db"])
    highest = max(points, key=lambda point: point["snr_db"])
    words = (
        f"Signal over error of single UNet calls, each fed with PyTorch's own latents, so that nothing adds up: "
        f"{_db(lowest['snr_db'])} at t = {lowest['timestep']:g} to {_db(highest['snr_db'])} at "
        f"t = {highest['timestep']:g}. Thick: the worst call at a timestep; thin: each prompt and branch of guidance."
    )
    if same:
        words += " Dashed: against PyTorch with the same rounded weights, so without what rounding weights costs."
    share = lowest["noise_share"]
    if share is not None and share < 0.05:
        words += (
            f" At t = {lowest['timestep']:g} noise is {_percent(share)} of the latent: an error in it moves the "
            "picture by as little."
        )
    if len(points) < curve["steps"]:
        words += f" {len(points)} timesteps of a schedule of {curve['steps']}: those that the gate compares."
    name = (
        f"The UNet's error by timestep: {_db(lowest['snr_db'])} at timestep {lowest['timestep']:g}, "
        f"{_db(highest['snr_db'])} at timestep {highest['timestep']:g}"
    )
    lines = [list(line) for line in zip(*calls, strict=True)] if even else []
    return {
        "plot": timesteps_plot(times, lines, worst, same, name),
        "title": "Error made at each timestep",
        "words": words,
    }


def _bits(activations: Facts) -> dict[str, str]:
    points = activations["points"]
    static = activations["way"] == "static"
    least = min(points, key=lambda point: point["least_bits"])
    lowest = min(point["median_bits"] for point in points)
    clipped = max(point["clipped_layers"] for point in points)
    words = f"How much of its range the input of each of {activations['layers']} layers fills at a timestep, in bits: "
    words += (
        "the range is calibrated, one for all timesteps. "
        if static
        else "if one range had to serve all timesteps. Here each tensor has its own and uses all 8. "
    )
    words += (
        f"The median layer uses {lowest:.1f} or more, the least {least['least_bits']:.1f} "
        f"({least['least_layer']} at t = {least['timestep']:g})."
    )
    if static and clipped:
        words += f" At most {clipped} layers meet values outside of their range at one timestep; these are clipped."
    times = [point["timestep"] for point in points]
    name = (
        f"Bits of activations by timestep: the median layer {lowest:.1f} or more, the least {least['least_bits']:.1f}"
    )
    return {
        "plot": bits_plot(
            times, [point["median_bits"] for point in points], [point["least_bits"] for point in points], name
        ),
        "title": "Activations: bits in use" if static else "Activations: what one range would leave",
        "words": words,
    }


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _db(value: float) -> str:
    return "equal" if value >= EXACT_DB else f"{value:.1f} dB"
