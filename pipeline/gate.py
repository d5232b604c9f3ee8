"""Prove what was built, before anybody sees it as a bundle: components first, then pictures where they are cheap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..runtimes.inputs import time_embedding_facts
from ..validate.probes import CHEAP_UNET, Probes, plan_for
from ..validate.report import ComponentReport, ParityReport
from ..validate.stages import GateComponent, GatePictures
from .artifacts import Checkpoint, TargetModel
from .stage import Runner

if TYPE_CHECKING:
    from ..export.accessories import Schedules, Tokenizer
    from ..runtimes.protocol import Target

THREADS = 2  # of gates; parity differs by the order of sums only


def ask_pytorch(checkpoint: Checkpoint, size: tuple[int, int], run: Runner) -> Probes:
    """PyTorch's answers along its own denoising trajectories: once for all targets and precisions."""
    from ..validate.reference import ReferenceProbes

    return run(ReferenceProbes(checkpoint, size, plan_for(checkpoint, size)))


def prove(
    models: Mapping[str, TargetModel],
    checkpoint: Checkpoint,
    target: Target,
    probes: Probes,
    tokenizer: Tokenizer,
    schedules: Schedules,
    run: Runner,
) -> ParityReport:
    """Hold every model of one target against PyTorch; the worst component comes first."""
    from ..validate.reference import RoundedReference

    time = time_embedding_facts(checkpoint.components["unet"].config)
    reports: list[ComponentReport] = []
    for name, model in models.items():
        rounded = None
        if model.precision != "fp32":
            rounded = run(RoundedReference(probes, checkpoint.components[name], model.precision))
        reports.append(run(GateComponent(model, probes, rounded, time, target.version(), THREADS)).report)
    reports.sort(key=lambda report: report.margin_db)
    report = ParityReport(target.name, tuple(reports))
    if not all(part.ok for part in reports) or not pictures_are_cheap(checkpoint, probes.size):
        return report
    drawn = run(
        GatePictures(
            models={name: model for name, model in models.items() if name != "vae_encoder"},
            probes=probes,
            precision=coarsest(models),
            tokenizer=tokenizer.folder,
            tokenizer_facts={"max_tokens": tokenizer.max_tokens, "pad_id": tokenizer.pad_id},
            schedule=schedules.read(schedules.compiled[0][0], probes.plan.steps),
            vae=vae_facts(checkpoint),
            time_embedding=time,
            runtime_version=target.version(),
            threads=THREADS,
        )
    )
    return ParityReport(target.name, tuple(reports), drawn.report)


def pictures_are_cheap(checkpoint: Checkpoint, size: tuple[int, int]) -> bool:
    """Whether whole pictures can be drawn in seconds rather than in many minutes."""
    scale = checkpoint.vae_scale
    return checkpoint.components["unet"].parameters * (size[0] // scale) * (size[1] // scale) < CHEAP_UNET


def coarsest(models: Mapping[str, TargetModel]) -> str:
    """The precision with the fewest bits among `models`: it sets the pictures' tolerance."""
    return min(models.values(), key=lambda model: model.bits_per_weight).precision


def vae_facts(checkpoint: Checkpoint) -> dict[str, float]:
    """Scaling factor and shift between the UNet's latents and the VAE's, from the VAE's config."""
    config = checkpoint.components["vae_decoder"].config
    return {
        "scaling_factor": float(config.get("scaling_factor") or 0.18215),  # AutoencoderKL's default, SD 1.x's value
        "shift": float(config.get("shift_factor") or 0.0),
    }
