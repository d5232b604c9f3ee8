"""What a conversion will need, told before it starts: peak memory and time of each stage, disk in all.

Each row of `COSTS` was fitted to conversions of Stable Diffusion 1.5 shapes at 512 x 512 and of the embedded demo;
docs/measurements.md has the runs. Memory is linear in the component's float32 weights and in the pixels of the
picture, because that is what the tools hold: copies of weights, and activations.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..quantize.scheme import parse_scheme
from .artifacts import COMPONENTS, Checkpoint
from .cache import Cache
from .errors import NoRoom
from .limits import MIB, memory_available_mib

_REFERENCE_PIXELS: Final = 512 * 512
_NARROWED_ABOVE: Final = 2**29  # bytes of a component for MNN, where it has narrow copies: runtimes/mnn/narrow.py


Share = float | Mapping[str, float]  # the same for every component, or by component (absent: 0)


@dataclass(frozen=True, slots=True)
class Cost:
    """One stage of one component, linear in its float32 weights and in the picture's area."""

    base_mib: float
    weights: Share = 0.0  # MiB a MiB of float32 weights
    pixels_mib: Share = 0.0  # MiB at 512 x 512
    seconds_base: float = 1.0
    seconds_per_gb: Share = 0.0  # of float32 weights
    seconds_pixels: Share = 0.0  # at 512 x 512
    disk: float = 0.0  # times the component's float32 weights, kept in the cache


# pnnx runs narrow copies of the model at small sizes: its convolutions' work space is what the VAE costs.
# A ControlNet has the first half of a UNet: it is taken for as hungry as one, and half as slow.
_PNNX_MIB: Final = {
    "text_encoder": 0.8,
    "text_encoder_2": 0.8,
    "unet": 0.02,
    "controlnet": 0.02,
    "vae_decoder": 4.2,
    "vae_encoder": 1.8,
}
_PNNX_SECONDS: Final = {
    "text_encoder": 25.0,
    "text_encoder_2": 25.0,
    "unet": 8.0,
    "controlnet": 8.0,
    "vae_decoder": 220.0,
    "vae_encoder": 220.0,
}

COSTS: Final[dict[str, Cost]] = {
    # stage: what every target starts from
    "export": Cost(550, 0.03, seconds_base=10, seconds_per_gb=9),
    "simplify": Cost(390, 0.01, seconds_base=3, seconds_per_gb=1),
    "weights fp32": Cost(110, 0.05, seconds_base=1, seconds_per_gb=4, disk=1.0),
    "weights fp16": Cost(110, 0.08, seconds_base=1, seconds_per_gb=4, disk=0.5),
    # stage, target: what a runtime's own converter holds
    "build ort": Cost(380, 1.0, seconds_base=3, seconds_per_gb=6, disk=1.0),
    "build ort without .ort": Cost(150, seconds_base=2, seconds_per_gb=2, disk=1.0),
    "build mnn": Cost(350, 2.17, seconds_base=2, seconds_per_gb=20, disk=1.0),
    "build mnn from narrow copies": Cost(420, 0.005, seconds_base=40, seconds_per_gb=4, disk=1.0),
    "build ncnn": Cost(500, _PNNX_MIB, seconds_base=8, seconds_per_gb=_PNNX_SECONDS, disk=1.0),
    # parity runs
    "reference": Cost(
        500,
        1.0,
        {"unet": 330, "controlnet": 330, "vae_decoder": 1050, "vae_encoder": 700},
        6,
        3,
        {"unet": 300, "controlnet": 150, "vae_decoder": 80, "vae_encoder": 40},
    ),
    "gate ort": Cost(
        160,
        1.15,
        {"unet": 470, "controlnet": 470, "vae_decoder": 1180, "vae_encoder": 730},
        1,
        3,
        {"unet": 35, "controlnet": 18, "vae_decoder": 18, "vae_encoder": 7},
    ),
    "gate mnn": Cost(
        150,
        1.2,
        {"unet": 430, "controlnet": 430, "vae_decoder": 770, "vae_encoder": 460},
        1,
        3,
        {"unet": 35, "controlnet": 18, "vae_decoder": 17, "vae_encoder": 8},
    ),
    "gate ncnn": Cost(
        130,
        1.2,
        {"unet": 980, "controlnet": 980, "vae_decoder": 1310, "vae_encoder": 680},
        1,
        3,
        {"unet": 55, "controlnet": 28, "vae_decoder": 70, "vae_encoder": 33},
    ),
}


_BESIDE_UNET: Final = ("reference", "controlnet")  # PyTorch holds both: each step needs the one, then the other


@dataclass(frozen=True, slots=True)
class StageForecast:
    """One stage of one component."""

    label: str
    peak_mib: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """The whole conversion; `peak_mib` is that of its largest stage, since stages run one after the other."""

    stages: tuple[StageForecast, ...]
    cache_bytes: int
    output_bytes: int

    @property
    def peak_mib(self) -> float:
        return max((stage.peak_mib for stage in self.stages), default=0.0)  # targets of others have no figures

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def run_mib(self, target: str) -> dict[str, float]:
        """Component -> peak memory of a process that runs it on `target`."""
        label = f" gate {target}"
        return {s.label.removesuffix(label): round(s.peak_mib) for s in self.stages if s.label.endswith(label)}

    def to_json(self) -> dict[str, Any]:
        return {
            "peak_mib": round(self.peak_mib),
            "cache_bytes": self.cache_bytes,
            "output_bytes": self.output_bytes,
            "seconds": round(self.seconds),
            "stages": [
                {"stage": s.label, "peak_mib": round(s.peak_mib), "seconds": round(s.seconds, 1)} for s in self.stages
            ],
        }


def forecast(
    checkpoint: Checkpoint,
    targets: Collection[str],
    precisions: Mapping[str, str],
    size: tuple[int, int],
    *,
    gate: bool,
) -> Forecast:
    """Forecast a conversion from headers alone. Times are rough: two busy cores of 2020 were measured."""
    stages: list[StageForecast] = []
    cache = output = 0.0
    for name in COMPONENTS:
        if name not in checkpoint.components:
            continue
        fp32 = checkpoint.components[name].parameters * 4
        stored = fp32 * parse_scheme(precisions[name].partition("+")[0]).weight_bits / 32
        onnx = bool({"ort", "mnn"} & set(targets))
        rows = ["export", "simplify", f"weights {precisions[name]}"] if onnx else []
        rows += ["reference"] if gate else []
        for target in targets:
            mobile = target == "ort" and stored < 2**31  # the .ort format's limit
            row = f"build {target}"
            if target == "ort" and not mobile:
                row += " without .ort"
            if target == "mnn" and _narrowed(name, precisions[name], fp32):
                row += " from narrow copies"
            rows.append(row)
            rows += [f"gate {target}"] if gate else []
            output += stored * (2 if mobile else 1)
        for row in rows:
            if row in COSTS:  # a target of another package has no figures here
                beside = checkpoint.components["unet"].parameters * 4 if (row, name) == _BESIDE_UNET else 0
                stages.append(_stage(row, name, fp32 + beside, size))
                cache += COSTS[row].disk * (fp32 if row.startswith("weights") else stored)
    return Forecast(tuple(stages), int(cache), int(output))


def _narrowed(component: str, precision: str, fp32_bytes: int) -> bool:
    """Whether MNN's converter gets copies of a component: a large one, but no text encoder in codes."""
    if component in ("unet", "controlnet") and precision != "fp16":
        return fp32_bytes > _NARROWED_ABOVE
    stored = {"fp32": fp32_bytes, "fp16": fp32_bytes // 2}.get(precision, 0)
    return stored > _NARROWED_ABOVE


def _stage(row: str, component: str, fp32_bytes: int, size: tuple[int, int]) -> StageForecast:
    cost = COSTS[row]
    area = size[0] * size[1] / _REFERENCE_PIXELS

    def of(share: Share) -> float:
        return share.get(component, 0.0) if isinstance(share, Mapping) else share

    memory = cost.base_mib + of(cost.weights) * fp32_bytes / MIB + of(cost.pixels_mib) * area
    seconds = cost.seconds_base + of(cost.seconds_per_gb) * fp32_bytes / 1e9 + of(cost.seconds_pixels) * area
    return StageForecast(f"{component} {row}", memory, seconds)


def refuse_if_too_small(needed: Forecast, cache: Path, output: Path) -> None:
    """Refuse a conversion that memory or disk clearly cannot hold.

    What the cache holds already is taken for stages of this conversion, which then need no room: whether they are
    could only be told from their keys, and a disk that fills is told when it happens.

    Raises:
        NoRoom: with both figures.
    """
    available = memory_available_mib()
    hint = "free some, choose fewer targets or fp16, or start anyway with --ignore-forecast"
    if needed.peak_mib > available:
        largest = max(needed.stages, key=lambda stage: stage.peak_mib)
        raise NoRoom(
            f"{largest.label} needs about {largest.peak_mib:.0f} MiB of memory, {available:.0f} MiB are available",
            hint=hint,
        )
    held = sum(entry.bytes for entry in Cache(cache).entries())
    places = {cache: max(0, needed.cache_bytes - held), output: needed.output_bytes}
    by_disk: dict[int, float] = {}
    for place, wanted in places.items():
        folder = next(parent for parent in [place, *place.absolute().parents] if parent.exists())
        device = folder.stat().st_dev
        by_disk[device] = by_disk.get(device, 0.0) + wanted
        free = shutil.disk_usage(folder).free
        if by_disk[device] > free:
            raise NoRoom(
                f"about {by_disk[device] / 1e9:.2f} GB will be written below {folder}, {free / 1e9:.2f} GB are free",
                hint=hint,
            )
