"""What a bundle is held against: the checkpoint that it was made of, and PyTorch's answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...bundle.bundle import Bundle
from ...bundle.recorded_rounding import recorded_rounding
from ...stages.cache import Cache
from ...stages.errors import BundleError
from ...stages.extras import require_converter
from ...stages.stage import Runner
from ..gate import ask_pytorch, ask_rounded
from .calibrate import calibrated
from .origin import Origin, open_reference_checkpoint
from .probes import Probes, RoundedAnswers

if TYPE_CHECKING:
    from ...quantize.plan import Plan
    from ...stages.artifacts import Checkpoint


@dataclass(frozen=True, slots=True)
class Known:
    """What a bundle is held against: PyTorch's answers, the plans of its weights, and the answers with these."""

    probes: Probes
    plans: Mapping[str, Plan]
    rounded: Mapping[str, RoundedAnswers]  # of every component but those at fp32


def intact_checkpoint(bundle: Bundle, reference: Origin | str | None, cache: Cache) -> Checkpoint:
    """The checkpoint that an undamaged `bundle` was made of.

    Raises:
        MissingTool: this is a light install.
        BundleError: a file differs from the manifest, or the checkpoint has other components.
        CheckpointError: there is no reference to compare with.
    """
    require_converter("a comparison with PyTorch")
    bundle.refuse_damage()
    checkpoint = open_reference_checkpoint(bundle, reference, cache)
    if set(bundle.components) != set(checkpoint.components):
        raise BundleError(
            f"{bundle.path} holds {sorted(bundle.components)}, its checkpoint has {sorted(checkpoint.components)}",
            hint="convert the checkpoint again",
        )
    return checkpoint


def known_answers(bundle: Bundle, checkpoint: Checkpoint, run: Runner) -> Known:
    """Ask PyTorch, or the cache."""
    facts = bundle.manifest
    probes = ask_pytorch(checkpoint, facts.size, run)
    stated = {name: bundle.plan(name) for name in bundle.components}
    plans = calibrated(stated, checkpoint, facts.size, recorded_rounding(bundle), run)
    coarse = [name for name in bundle.components if facts.components[name].precision != "fp32"]
    rounded = {name: ask_rounded(probes, checkpoint.components[name], plans[name], run) for name in coarse}
    return Known(probes, plans, rounded)
