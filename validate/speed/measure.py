"""`profile`: how fast and how large each component of a bundle is on this machine."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle.bundle import Bundle
from ...bundle.sessions import opener
from ...runtimes.inputs import native_feeds
from ...runtimes.isolation import open_isolated
from ...stages.cache import Cache
from ...stages.errors import UsageError
from ...stages.extras import require_converter
from ...stages.progress import Progress, Silent
from .latency import ComponentProfile, Contestant, Entrant, ProfileReport, profile_component
from .memory import bytes_on_disk

if TYPE_CHECKING:
    from ...runtimes.protocol import Array, Feeds, Session
    from ...stages.artifacts import Checkpoint, TensorSpec
    from ..reference.origin import Origin

QUICK_RUNS = 5
TORCH = "diffusette.validate.reference.torch_session:open_reference"


def measure_bundle(bundle: Bundle, *, progress: Progress | None = None, **options: Any) -> ProfileReport:
    """Time one bundle; `options` are those of `measure_bundles`."""
    (report,) = measure_bundles([bundle], progress=progress or Silent(), **options)
    return report


def measure_bundles(
    bundles: Sequence[Bundle],
    *,
    runs: int = 5,
    threads: int = 2,
    versus_torch: bool = False,
    reference: Origin | str | None = None,
    form: str | None = None,
    components: Sequence[str] | None = None,
    cache: Cache | None = None,
    progress: Progress,
) -> tuple[ProfileReport, ...]:
    """Time every component in a process of its own, bundles of one checkpoint and PyTorch eager taking turns.

    Args:
        components: these only, which every bundle has; None: all of the first.
    Raises:
        BundleError: a file differs from the manifest.
        CheckpointError: PyTorch was asked for and the checkpoint is not known here.
        UsageError: a bundle lacks `form`, or `runs` is below 1.
    """
    if runs < 1:
        raise UsageError(f"{runs} runs measure nothing", hint="ask for at least one")
    if versus_torch:
        require_converter("timing PyTorch")
    for bundle in bundles:
        bundle.refuse_damage()
    timed = tuple(components or bundles[0].components)
    models = [{name: bundle.model(name, form) for name in timed} for bundle in bundles]
    checkpoint = None
    if versus_torch:
        from ..reference.origin import open_reference_checkpoint

        checkpoint = open_reference_checkpoint(bundles[0], reference, cache or Cache.default())
    profiles: list[list[ComponentProfile]] = [[] for _ in bundles]
    for name in timed:
        entrants = [
            Entrant(
                found[name].precision,
                Contestant(partial(opener(bundle, threads, form, timed=True), name), partial(_feeds, bundle)),
                bytes_on_disk(Path(bundle.path, file) for file in found[name].files),
            )
            for bundle, found in zip(bundles, models, strict=True)
        ]
        torch = _torch(checkpoint, name, bundles[0], threads) if checkpoint else None
        with progress.running(f"{name} x {runs}"):
            found_times = profile_component(name, entrants, threads=threads, runs=runs, torch=torch)
        for kept, profile in zip(profiles, found_times, strict=True):
            kept.append(profile)
    machine_name = machine()
    return tuple(
        ProfileReport(bundle.manifest.target.name, tuple(kept), machine_name)
        for bundle, kept in zip(bundles, profiles, strict=True)
    )


def quick_profile(
    bundle: Bundle, wanted: bool | None, *, reference: Origin | None, threads: int, progress: Progress
) -> dict[str, Any] | None:
    """A few runs next to PyTorch, as `profile --json` says them; None where they are not wanted.

    Args:
        wanted: None: where they take seconds.
    """
    from ..gate import pictures_are_cheap
    from ..reference.origin import open_reference_checkpoint

    if wanted is None:
        checkpoint = open_reference_checkpoint(bundle, reference, Cache.default())
        wanted = pictures_are_cheap(checkpoint, bundle.manifest.size)
    if not wanted:
        return None
    options = {"runs": QUICK_RUNS, "threads": threads, "versus_torch": True, "reference": reference}
    return {**measure_bundle(bundle, progress=progress, **options).to_json(), "busy": busy()}


def _torch(checkpoint: Checkpoint, name: str, bundle: Bundle, threads: int) -> Contestant:
    from ..reference.torch_session import TorchModel

    model = TorchModel(checkpoint.components[name], bundle.manifest.size)
    open_torch: Callable[[], Session] = partial(
        open_isolated, TORCH, model, threads=threads, name=f"torch {name}", timed=True
    )
    return Contestant(open_torch, partial(_feeds, bundle))  # type: ignore[arg-type]


def _feeds(bundle: Bundle, session: Session) -> Feeds:
    return random_feeds(bundle, session.inputs)


def random_feeds(bundle: Bundle, inputs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Feeds of the right kind for any model: time depends on shapes, not on values, in these models."""
    rng = np.random.default_rng(0)
    canonical: dict[str, Array] = {"timestep": np.array(500.0, np.float32)}
    for spec in inputs:
        if spec.dtype.startswith("int"):
            canonical[spec.name] = np.full(spec.shape, bundle.manifest.tokenizer.eos_id, spec.dtype)
        elif spec.name not in ("timestep", "timestep_embedding"):
            canonical[spec.name] = rng.standard_normal(spec.shape).astype(spec.dtype)
    return native_feeds(canonical, inputs, bundle.manifest.time_embedding.model_dump())


def busy() -> float | None:
    """The load average of the last minute if it is more than a measurement itself makes, else None."""
    import os

    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return load if load > 1.5 * cores else None


def machine() -> str:
    """Processor and cores, for people."""
    import os

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {os.cpu_count()} cores"
