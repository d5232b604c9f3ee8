"""What stages cost, measured: peak memory in MiB, seconds on two cores, disk.

Fitted to conversions of Stable Diffusion 1.5, 2.1 and XL in shape, at fp16 and fp32; docs/measurements.md has the runs
beside the forecast. Memory is linear in what the tools hold: copies of weights, the largest tensor, activations, and
the scores of the largest attention. Memory is that of the stage's process and the programs that it starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Cost:
    """One stage of one component; see `forecast.Extent` for what the shares multiply."""

    base: float  # MiB
    weights: float = 0.0
    stored: float = 0.0
    tensor: float = 0.0
    read: float = 0.0
    area: float = 0.0  # MiB at 512 x 512
    scores: float = 0.0
    seconds: float = 1.0
    seconds_gb: float = 0.0  # of float32 weights
    seconds_area: float = 0.0  # at 512 x 512
    disk: float = 0.0  # times what the plan stores
    disk_area: float = 0.0  # MiB at 512 x 512


PARENT_MIB: Final = 100.0
"""What the process that runs the stages holds beside them."""


def _all(cost: Cost) -> dict[str, Cost]:
    return _by_kind(cost, cost)


def _by_kind(text: Cost, image: Cost) -> dict[str, Cost]:
    """Figures for text encoders, whose largest tensor is a table that is read by rows, and for the rest."""
    return {"text": text, "denoiser": image, "decoder": image, "encoder": image}


# Stage -> role of the component -> cost. Those of no component have the key "".
COSTS: Final[Mapping[str, Mapping[str, Cost]]] = {
    "tokenizer": {"": Cost(100, seconds=1)},
    "schedules": {"": Cost(410, seconds=5)},
    # what every target starts from
    "scan": _by_kind(Cost(50, read=1.0, seconds=0.3, seconds_gb=0.4), Cost(50, read=1.5, seconds=0.3, seconds_gb=0.4)),
    "export": {
        "text": Cost(470, tensor=0.1, seconds=3.5, seconds_gb=1.5),
        "denoiser": Cost(480, weights=0.011, seconds=5, seconds_gb=2.5),
        "decoder": Cost(460, seconds=4),
        "encoder": Cost(460, seconds=4),
    },
    "simplify": _all(Cost(338, weights=0.009, seconds=3)),
    # a tensor that is stored as float32 need not be widened first
    "weights": _by_kind(
        Cost(60, tensor=3.65, read=-2.3, seconds=1, seconds_gb=4, disk=1),
        Cost(60, tensor=2.85, seconds=1, seconds_gb=4, disk=1),
    ),
    # what a runtime's own converter holds
    "build-ort": _all(Cost(320, seconds=3, seconds_gb=3, disk=2)),
    "build-ort without .ort": _all(Cost(155, seconds=2, seconds_gb=2, disk=1)),
    "mnn": _all(Cost(340, weights=1.8, seconds=3, seconds_gb=28, disk=1)),
    "mnn-form": _all(Cost(320, weights=0.005, seconds=15, seconds_gb=6)),
    # where each level has a number of heads of its own, copies must be wider for constants to stay apart
    "mnn-form of uneven heads": {"denoiser": Cost(1400, seconds=15, seconds_gb=6)},
    "mnn from narrow copies": _by_kind(
        Cost(75, tensor=4.6, seconds=2, seconds_gb=5, disk=1), Cost(70, tensor=2.75, seconds=2, seconds_gb=5, disk=1)
    ),
    "pnnx": {
        "text": Cost(520, tensor=0.9, seconds=4.5),
        "denoiser": Cost(560, weights=0.135, seconds=9, seconds_gb=1.2),
        "decoder": Cost(760, tensor=122, seconds=17),
        "encoder": Cost(570, tensor=75, seconds=9),
    },
    "weights ncnn": _by_kind(
        Cost(55, tensor=2.35, seconds=1, seconds_gb=4, disk=1), Cost(50, tensor=2.75, seconds=1, seconds_gb=4, disk=1)
    ),
    # parity runs
    "scan-activations": {
        "text": Cost(430, weights=1, seconds=3, seconds_gb=1),
        "denoiser": Cost(380, weights=1, area=380, seconds=3, seconds_gb=3, seconds_area=20),
        "decoder": Cost(380, weights=1, area=1030, seconds=3, seconds_area=26),
        "encoder": Cost(380, weights=1, area=680, seconds=3, seconds_area=13),
    },
    "reference-probes": {
        "text": Cost(430, weights=1, seconds=4, seconds_gb=2),
        "denoiser": Cost(380, weights=1, area=340, seconds=3, seconds_gb=1, seconds_area=35, disk_area=11),
        "decoder": Cost(380, weights=1, area=1050, seconds=1, seconds_area=8),
        "encoder": Cost(380, weights=1, area=700, seconds=1, seconds_area=4),
    },
    "rounded-reference": {
        "text": Cost(380, weights=1, tensor=2.6, seconds=4, seconds_gb=3),
        "denoiser": Cost(380, weights=1, area=370, seconds=4, seconds_gb=3, seconds_area=25),
        "decoder": Cost(380, weights=1, area=1015, seconds=4, seconds_area=14),
        "encoder": Cost(380, weights=1, area=665, seconds=3, seconds_area=6),
    },
    "gate ort": {  # of both forms the larger
        "text": Cost(100, weights=0.5, stored=1.1, seconds=2, seconds_gb=3),
        "denoiser": Cost(100, weights=0.42, stored=0.6, area=500, scores=0.9, seconds=4, seconds_gb=4, seconds_area=30),
        "decoder": Cost(110, weights=1, area=1390, seconds=3, seconds_area=27),
        "encoder": Cost(110, weights=1, area=670, seconds=2, seconds_area=13),
    },
    "gate ort without .ort": {
        "denoiser": Cost(100, weights=0.42, area=500, scores=0.9, seconds=4, seconds_gb=4, seconds_area=30),
    },
    "gate ncnn": {
        "text": Cost(90, weights=1.05, seconds=1, seconds_gb=2),
        "denoiser": Cost(110, weights=1.1, area=500, scores=2, seconds=2, seconds_gb=2, seconds_area=24),
        "decoder": Cost(110, weights=1.1, area=1250, seconds=1, seconds_area=34),
        "encoder": Cost(110, weights=1.1, area=850, seconds=1, seconds_area=15),
    },
    # above 512 x 512 norms are taken apart: docs/decisions/0101
    "gate ncnn of large pictures": {
        "decoder": Cost(110, weights=1.1, area=1680, seconds=1, seconds_area=34),
        "encoder": Cost(110, weights=1.1, area=1180, seconds=1, seconds_area=15),
    },
    "gate mnn": {
        "text": Cost(250, weights=1.1, seconds=1, seconds_gb=4),
        "denoiser": Cost(120, weights=1.0, area=140, scores=1.84, seconds=2, seconds_gb=3, seconds_area=40),
        "decoder": Cost(120, weights=1.2, area=670, seconds=1, seconds_area=34),
        "encoder": Cost(120, weights=1.2, area=500, seconds=1, seconds_area=12),
    },
    "gate mnn of large pictures": {
        "decoder": Cost(120, weights=1.2, area=910, seconds=1, seconds_area=34),
        "encoder": Cost(120, weights=1.2, area=553, seconds=1, seconds_area=12),
    },
}
