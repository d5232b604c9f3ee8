"""`profile --ops`: what every operation of a bundle's graphs takes, and which of PyTorch's modules it belongs to."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle.bundle import Bundle
from ...runtimes.op_times import OpTimed
from ...runtimes.registry import get_target
from ...runtimes.taps import Tapped, inherit_modules
from ...stages.cache import Cache
from ...stages.child import run_in_child
from ...stages.errors import CheckpointError, MissingTool, UsageError
from ...stages.progress import Progress
from ...stages.publish import scratch_folder
from ...stages.run_stage import run_stage
from ...stages.stage import Runner
from ..reference.origin import Origin, open_reference_checkpoint
from .measure import random_feeds
from .op_profile import OpProfile, TimeOps

if TYPE_CHECKING:
    from ...stages.artifacts import Checkpoint, TargetModel


def profile_ops(
    bundle: Bundle,
    *,
    runs: int,
    threads: int,
    reference: Origin | str | None = None,
    form: str | None = None,
    cache: Cache | None = None,
    progress: Progress,
) -> tuple[OpProfile, ...]:
    """Time every operation of every component, each component in a process of its own.

    Args:
        reference: the checkpoint, for the names of modules. None: where it was converted; if that is not known here,
            operations have the runtime's names alone (ONNX Runtime's `.onnx` says its modules by itself).
    Raises:
        UsageError: the bundle's target does not time its operations, or the bundle lacks `form`.
        CheckpointError: `reference` is not the bundle's checkpoint.
        BundleError: a file differs from the manifest.
    """
    target = get_target(bundle.manifest.target.name)
    if not isinstance(target, OpTimed):
        raise UsageError(f"target {target.name!r} does not time its operations", hint="leave out --ops")
    target.require()
    bundle.refuse_damage()
    cache = cache or Cache.default()
    checkpoint = _checkpoint(bundle, reference, cache)
    profiles = []
    for name in bundle.components:
        model = bundle.model(name, form)
        with scratch_folder(cache.root / "work", "ops") as folder:
            np.savez(folder / "feeds.npz", allow_pickle=False, **random_feeds(bundle, model.inputs))
            with progress.running(f"{name} operations x {runs}") as watch:
                facts, _ = run_in_child(
                    TimeOps(model, folder / "feeds.npz", threads, runs), folder, cache.root / "work", watch
                )
        profile = _profile({**facts, "folder": bundle.path})
        if checkpoint:
            run: Runner = partial(run_stage, cache=cache, progress=progress)
            profile = _with_modules(profile, model, checkpoint, bundle.manifest.size, run)
        profiles.append(profile)
    return tuple(profiles)


def _checkpoint(bundle: Bundle, reference: Origin | str | None, cache: Cache) -> Checkpoint | None:
    try:
        return open_reference_checkpoint(bundle, reference, cache)
    except (CheckpointError, MissingTool):
        if reference not in (None, Origin()):
            raise
        return None


def _profile(facts: dict[str, Any]) -> OpProfile:
    from pydantic import TypeAdapter

    return TypeAdapter(OpProfile).validate_python(facts)


def _with_modules(
    profile: OpProfile, model: TargetModel, checkpoint: Checkpoint, size: tuple[int, int], run: Runner
) -> OpProfile:
    """Add the modules that `validate --layers` knows the tensors of the graph by."""
    target = get_target(model.target)
    if not isinstance(target, Tapped):
        return profile
    nodes = inherit_modules(target.wiring(model, checkpoint.components[model.component], size, run).nodes)
    modules = {tensor: node.module for node in nodes for tensor in node.outputs}
    return replace(
        profile, ops=tuple(replace(op, module=op.module or modules.get(op.tensor, "")) for op in profile.ops)
    )
