"""What a conversion will need, told before it starts: peak memory, disk and time of each stage.

`costs` has the figures; here is what they are multiplied with, from headers and configurations alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Final

from ..checkpoints.config import pixels_per_latent, vae_pixels_per_latent
from ..quantize.scheme import Scheme, parse_scheme
from ..stages.artifacts import ROLES, Checkpoint, ComponentSource, Role, role_of
from ..stages.cache import Cache
from ..stages.errors import NoRoom
from ..stages.limits import MIB, memory_available_mib
from .costs import COSTS, PARENT_MIB, Cost

_REFERENCE_PIXELS: Final = 512 * 512
_ORT_FORM: Final = 2**31  # bytes that a `.ort` file may have


@dataclass(frozen=True, slots=True)
class StageForecast:
    """One stage. Memory is that of its process and the programs it starts; disk what it leaves in the cache."""

    label: str
    peak_mib: float
    seconds: float
    disk_bytes: int = 0
    fitted: bool = True  # the figures come from measurements of such stages


@dataclass(frozen=True, slots=True)
class Forecast:
    """The whole conversion. Stages run one after the other."""

    stages: tuple[StageForecast, ...]
    cache_bytes: int
    output_bytes: int

    @property
    def peak_mib(self) -> float:
        """Of the largest stage, with the process that started it."""
        largest = max((stage.peak_mib for stage in self.stages), default=0.0)
        return largest + PARENT_MIB if largest else 0.0  # targets of others have no figures

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
                {
                    "stage": s.label,
                    "peak_mib": round(s.peak_mib),
                    "disk_bytes": s.disk_bytes,
                    "seconds": round(s.seconds, 1),
                }
                for s in self.stages
            ],
        }


@dataclass(frozen=True, slots=True)
class Extent:
    """What the stages of a component grow with, in MiB unless said otherwise."""

    weights: float  # all, as float32
    stored: float  # all, as the plan stores them
    tensor: float  # the largest, as float32
    read: float  # the largest, as the checkpoint stores it
    area: float  # of the picture, in squares of 512 pixels
    scores: float  # the largest matrix of attention scores, as float32


def forecast(
    checkpoint: Checkpoint,
    targets: Collection[str],
    precisions: Mapping[str, str],
    size: tuple[int, int],
    *,
    gate: bool,
) -> Forecast:
    """Forecast a conversion from headers alone. Times are rough: two cores of 2020 were measured.

    Args:
        precisions: the label of each component's plan.
    """
    known = tuple(target for target in targets if target in _KNOWN)
    stages = [_stage(row, cost, _NOTHING, True) for row in _ASIDE if known and (cost := _cost(row))]
    asked: list[StageForecast] = []
    output = 0.0
    for name in ROLES:
        if name not in checkpoint.components:
            continue
        schemes = [parse_scheme(scheme) for scheme in precisions[name].split("+")]
        source = checkpoint.components[name]
        extent = extent_of(source, schemes[0], size)
        fitted = all(scheme.is_float for scheme in schemes) and role_of(name) not in _NOT_MEASURED
        rounded = {scheme.name for scheme in schemes} - {"fp32", source.dtype.replace("float", "fp")}
        narrowed = _narrowed(name, precisions[name], extent)
        uneven = isinstance(source.config.get("attention_head_dim"), list | tuple)
        for row in _rows(known, schemes, gate, rounded=bool(rounded), narrowed=narrowed):
            if cost := _cost(_special(row, name, precisions[name], extent, uneven=uneven), name):
                stages.append(_stage(f"{name} {row}", cost, extent, fitted))
        if known and gate and (cost := _cost(_REFERENCE, name)):
            # PyTorch holds a ControlNet and the UNet: each step needs the one, then the other
            beside = checkpoint.denoiser.parameters * 4 / MIB if role_of(name) == "control" else 0.0
            asked.append(_stage(name, cost, replace(extent, weights=extent.weights + beside), True))
        forms = {"ort": 2 if _has_ort_form(extent) else 1}
        output += sum(extent.stored * MIB * forms.get(target, 1) for target in targets)
    if asked:
        seconds, disk = sum(stage.seconds for stage in asked), sum(stage.disk_bytes for stage in asked)
        stages.append(StageForecast(_REFERENCE, max(stage.peak_mib for stage in asked), seconds, disk))
    return Forecast(tuple(stages), sum(stage.disk_bytes for stage in stages), int(output))


_BUILDS: Final = {"ort": ("build-ort",), "mnn": ("mnn",), "ncnn": ("pnnx", "weights ncnn")}
_NOTHING: Final = Extent(0, 0, 0, 0, 0, 0)
_KNOWN: Final = frozenset({"ort", "ncnn", "mnn"})  # a target of another package has no figures here
_ASIDE: Final = ("tokenizer", "schedules")  # stages of no component
_NARROWED_ABOVE_MIB: Final = 512  # of a component for MNN, where it has narrow copies: runtimes/mnn/narrow.py
_LIKE: Final[Mapping[Role, Role]] = {"control": "denoiser"}  # a ControlNet has the first half of a UNet
_NOT_MEASURED: Final = ("control",)
_DENOISING: Final = ("denoiser", "control")
_REFERENCE: Final = "reference-probes"  # one stage, which opens one component after the other


def _rows(
    targets: tuple[str, ...], schemes: list[Scheme], gate: bool, *, rounded: bool, narrowed: bool
) -> Iterator[str]:
    """Names of the stages of one component, as `stage.place_of` tells them.

    Args:
        rounded: whether its weights become others than they are in the checkpoint.
        narrowed: whether MNN's converter gets copies of it.
    """
    if not targets:
        return
    if any(scheme.is_half for scheme in schemes):
        yield from ("scan", "scan-activations") if gate else ("scan",)
    if {"ort", "mnn"} & set(targets):
        yield from ("export", "simplify")
    if "ort" in targets or ("mnn" in targets and not narrowed):
        yield "weights"
    if gate and rounded:
        yield "rounded-reference"
    for target in targets:
        yield from ("mnn-form", "mnn") if target == "mnn" and narrowed else _BUILDS[target]
        if gate:
            yield f"gate {target}"


def _special(row: str, component: str, precision: str, extent: Extent, *, uneven: bool) -> str:
    """The row of `COSTS` for a stage that works in two ways.

    Args:
        uneven: whether each level of a UNet has a number of heads of its own.
    """
    if row == "build-ort" and not _has_ort_form(extent):
        return "build-ort without .ort"
    if row == "gate ort" and role_of(component) == "denoiser" and not _has_ort_form(extent):
        return "gate ort without .ort"
    if row == "mnn" and _narrowed(component, precision, extent):
        return "mnn from narrow copies"
    if row == "mnn-form" and uneven and role_of(component) in _DENOISING:
        return "mnn-form of uneven heads"
    if row in ("gate ncnn", "gate mnn") and component.startswith("vae") and extent.area > 1:
        return f"{row} of large pictures"
    return row


def _narrowed(component: str, precision: str, extent: Extent) -> bool:
    """Whether MNN's converter gets copies of a component: a large one, but no text encoder in codes."""
    if role_of(component) in _DENOISING and precision != "fp16":
        return extent.weights > _NARROWED_ABOVE_MIB
    return precision in ("fp32", "fp16") and extent.stored > _NARROWED_ABOVE_MIB


def _has_ort_form(extent: Extent) -> bool:
    return extent.stored * MIB < _ORT_FORM


def extent_of(source: ComponentSource, scheme: Scheme, size: tuple[int, int]) -> Extent:
    """How large a component is, from its configuration.

    Args:
        scheme: how most of its weights are stored.
        size: of the picture, in pixels.
    """
    config, weights = source.config, source.parameters * 4 / MIB
    channels = [_number(count) for count in config.get("block_out_channels", ())]
    if channels:
        widest = max(channels)
        # a residual block of the way up takes the block below and the one beside it: twice as many channels
        tensor = widest * widest * (2 if role_of(source.component) == "denoiser" else 1) * 9
    else:
        tensor = _number(config.get("vocab_size")) * _number(config.get("hidden_size"))
    return Extent(
        weights=weights,
        stored=weights * scheme.weight_bits / 32,
        tensor=tensor * 4 / MIB,
        read=tensor * (4 if source.dtype == "float32" else 2) / MIB,
        area=prod(size) / _REFERENCE_PIXELS if channels else 0.0,
        scores=max(_scores(source, size), default=0) * 4 / MIB,
    )


def _scores(source: ComponentSource, size: tuple[int, int]) -> Iterator[int]:
    """Numbers in the attention scores of each level that attends to itself: heads x tokens x tokens."""
    config = source.config
    channels = config.get("block_out_channels", ())
    is_vae = source.component.startswith("vae")
    pixels = vae_pixels_per_latent(config) if is_vae and channels else pixels_per_latent(config)
    tokens = prod(size) // pixels**2  # latents, which is what a UNet's first level sees and a VAE's last
    if is_vae and channels:
        yield tokens**2
    if role_of(source.component) in _DENOISING:
        heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 8
        for level, kind in enumerate(config.get("down_block_types", ())):
            if "CrossAttn" in str(kind):
                count = heads[min(level, len(heads) - 1)] if isinstance(heads, list | tuple) else heads
                yield _number(count, 8) * (tokens // 4**level) ** 2


def _number(value: Any, otherwise: int = 0) -> int:
    """`value` if it is one. What is none builds no network, which the export says in the words of the configuration."""
    return value if isinstance(value, int) else otherwise


def _stage(label: str, cost: Cost, extent: Extent, fitted: bool) -> StageForecast:
    peak = cost.base + cost.weights * extent.weights + cost.stored * extent.stored + cost.tensor * extent.tensor
    peak += cost.read * extent.read + cost.area * extent.area + cost.scores * extent.scores
    seconds = cost.seconds + cost.seconds_gb * extent.weights * MIB / 1e9 + cost.seconds_area * extent.area
    disk = cost.disk * extent.stored + cost.disk_area * extent.area
    return StageForecast(label, peak, seconds, int(disk * MIB), fitted)


def _cost(row: str, component: str = "") -> Cost | None:
    """The row's figures for a component, or for the one that it is like."""
    if not component:
        return COSTS.get(row, {}).get("")
    role = role_of(component)
    return COSTS.get(row, {}).get(_LIKE.get(role, role))


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
            f"{largest.label} needs about {needed.peak_mib:.0f} MiB of memory, {available:.0f} MiB are available",
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
