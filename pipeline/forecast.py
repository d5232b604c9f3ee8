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

from .artifacts import COMPONENTS, Checkpoint
from .errors import NoRoom

MIB: Final = 2**20
_REFERENCE_PIXELS: Final = 512 * 512


@dataclass(frozen=True, slots=True)
class Cost:
    """One stage of one component: base + weights x float32 size + pixels x picture size."""

    base_mib: float
    weights: float = 0.0  # times the component's float32 weights
    pixels_mib: Mapping[str, float] | None = None  # component -> MiB at 512 x 512, scales with the area
    seconds_base: float = 1.0
    seconds_per_gb: float = 0.0  # of float32 weights
    seconds_pixels: Mapping[str, float] | None = None  # component -> seconds at 512 x 512
    disk: float = 0.0  # times the component's float32 weights, kept in the cache


_UNET_VAE: Final = {"unet": 900.0, "vae_decoder": 2100.0, "vae_encoder": 1700.0}

COSTS: Final[dict[str, Cost]] = {
    # stage: what every target starts from
    "export": Cost(430, 0.04, seconds_base=8, seconds_per_gb=15),
    "simplify": Cost(340, 0.02, seconds_base=2, seconds_per_gb=3),
    "weights fp32": Cost(100, 0.035, seconds_base=1, seconds_per_gb=8, disk=1.0),
    "weights fp16": Cost(100, 0.035, seconds_base=1, seconds_per_gb=8, disk=0.5),
    # stage, target: what a runtime's own converter holds
    "build ort": Cost(200, 2.2, seconds_base=2, seconds_per_gb=15, disk=1.0),
    "build mnn": Cost(200, 2.25, seconds_base=1, seconds_per_gb=35, disk=1.0),
    "build ncnn": Cost(400, 2.5, _UNET_VAE, seconds_base=5, seconds_per_gb=150, disk=0.5),
    # parity runs
    "reference": Cost(500, 1.0, _UNET_VAE, 6, 3, {"unet": 190, "vae_decoder": 12, "vae_encoder": 8}),
    "gate ort": Cost(150, 1.3, _UNET_VAE, 2, 10, {"unet": 60, "vae_decoder": 12, "vae_encoder": 8}),
    "gate mnn": Cost(150, 1.25, _UNET_VAE, 2, 10, {"unet": 60, "vae_decoder": 15, "vae_encoder": 10}),
    "gate ncnn": Cost(150, 1.25, _UNET_VAE, 2, 10, {"unet": 70, "vae_decoder": 25, "vae_encoder": 15}),
}


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
        return max(stage.peak_mib for stage in self.stages)

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
        half = precisions[name] == "fp16"
        rows = [f"weights {precisions[name]}"] if {"ort", "mnn"} & set(targets) else []
        rows += ["export", "simplify"] if rows else []
        rows += ["reference"] if gate else []
        for target in targets:
            rows += [f"build {target}", *([f"gate {target}"] if gate else [])]
            forms = 2 if target == "ort" and fp32 * (0.5 if half else 1) < 2 * 2**30 else 1
            output += forms * fp32 * (0.5 if half else 1.0)
        for row in rows:
            if row in COSTS:
                stages.append(_stage(row, name, fp32, size))
                cache += COSTS[row].disk * fp32
    return Forecast(tuple(stages), int(cache), int(output))


def _stage(row: str, component: str, fp32_bytes: int, size: tuple[int, int]) -> StageForecast:
    cost = COSTS[row]
    area = size[0] * size[1] / _REFERENCE_PIXELS
    memory = cost.base_mib + cost.weights * fp32_bytes / MIB + area * (cost.pixels_mib or {}).get(component, 0.0)
    seconds = cost.seconds_base + cost.seconds_per_gb * fp32_bytes / 1e9
    return StageForecast(f"{component} {row}", memory, seconds + area * (cost.seconds_pixels or {}).get(component, 0.0))


def memory_available_mib() -> float:
    """What this process may still take: the system's available memory, or less where a cgroup limits it."""
    import psutil

    available = float(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        available = min(available, float(text) - float(used.read_text()))
    return available / MIB


def refuse_if_too_small(needed: Forecast, cache: Path, output: Path) -> None:
    """Refuse a conversion that memory or disk clearly cannot hold.

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
    places = {cache: needed.cache_bytes, output: needed.output_bytes}
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
