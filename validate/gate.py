"""Prove what was built, before anybody sees it as a bundle: components first, then pictures where they are cheap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, overload

from ..bundle.pack_inputs import vae_entry
from ..checkpoints.families.variant import reads_zeros_for_empty
from ..runtimes.inputs import time_embedding_facts
from ..runtimes.txt2img.canvas import INPAINTING_CHANNELS
from ..stages.artifacts import Checkpoint, ComponentSource, TargetModel, sole
from ..stages.errors import CheckpointError, ToolCrashed
from ..stages.stage import Runner, Stage
from .reference.probes import CHEAP_UNET, Probes, RoundedAnswers, plan_for
from .report import ComponentReport, ImageReport, ParityReport
from .stages import GateComponent, GatedComponent, GatedPictures, GatePictures, worst_form
from .tolerances import coarsest_scheme

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest
    from ..export.accessories import Schedules, Tokenizer
    from ..export.compiled_schedule import CompiledSchedule
    from ..quantize.plan import Plan
    from ..runtimes.protocol import Target

THREADS = 2  # of gates; parity differs by the order of sums only


def ask_pytorch(checkpoint: Checkpoint, size: tuple[int, int], run: Runner) -> Probes:
    """PyTorch's answers along its own denoising trajectories: once for all targets and precisions."""
    from .reference.pytorch import ReferenceProbes

    return run(ReferenceProbes(checkpoint, size, plan_for(checkpoint, size)))


def ask_rounded(probes: Probes, source: ComponentSource, plan: Plan, run: Runner) -> RoundedAnswers:
    """PyTorch's answers with the weights that `plan` leaves: the same for every target."""
    from ..quantize.quantized import quantized_weights
    from .reference.pytorch import RoundedReference

    return run(RoundedReference(probes, source, plan, quantized_weights(source, plan, run)))


def prove(
    models: Mapping[str, TargetModel],
    plans: Mapping[str, Plan],
    checkpoint: Checkpoint,
    target: Target,
    probes: Probes,
    tokenizers: tuple[Tokenizer, ...],
    schedules: Schedules,
    run: Runner,
) -> ParityReport:
    """Hold every model of one target against PyTorch; the worst component comes first."""
    vae = vae_entry(*(checkpoint.components[half].config for half in ("vae_decoder", "vae_encoder")))
    time = time_embedding_facts(checkpoint.denoiser.config)
    reports: list[ComponentReport] = []
    for name, model in models.items():
        rounded = None
        if model.precision != "fp32":
            rounded = ask_rounded(probes, checkpoint.components[name], plans[name], run)
        forms = ("", *model.forms)
        gates = (GateComponent(model, probes, rounded, time, target.version(), THREADS, form) for form in forms)
        reports.append(worst_form(_outcome(gate, run) for gate in gates))
    reports.sort(key=lambda report: report.margin_db)
    report = ParityReport(target.name, tuple(reports))
    if not all(part.ok for part in reports) or not pictures_are_cheap(checkpoint, probes.size):
        return report
    tokenizer, second = tokenizers[0], tokenizers[1] if len(tokenizers) > 1 else None
    channels = int(checkpoint.denoiser.config["in_channels"])
    inpaints = channels == INPAINTING_CHANNELS  # only then a picture starts from another
    drawn = _outcome(
        GatePictures(
            models={name: model for name, model in models.items() if name != "vae_encoder" or inpaints},
            probes=probes,
            precision=coarsest(models),
            tokenizer=tokenizer.folder,
            tokenizer_digest=tokenizer.digest,
            tokenizer_facts=tokenizer.facts,
            schedule=gate_schedule(checkpoint, schedules, probes.plan.steps),
            vae=vae.model_dump(exclude={"force_upcast"}),
            time_embedding=time,
            runtime_version=target.version(),
            threads=THREADS,
            tokenizer_2=second.folder if second else None,
            tokenizer_2_digest=second.digest if second else "",
            tokenizer_2_facts=second.facts if second else {},
            zeros_for_empty=reads_zeros_for_empty(checkpoint),
            input_channels=channels,
        ),
        run,
    )
    return ParityReport(target.name, tuple(reports), beside_rounding(drawn, checkpoint, plans, probes, run))


def beside_rounding(
    report: ImageReport, checkpoint: Checkpoint, plans: Mapping[str, Plan], probes: Probes, run: Runner
) -> ImageReport:
    """`report`; where pictures lie below their tolerance, with what rounding alone takes from this checkpoint's.

    Args:
        plans: component -> how its weights are rounded.
        probes: whose pictures were drawn.
    """
    from ..quantize.quantized import quantized_weights
    from .reference.rounded_pictures import RoundedPictures

    rounded = {part: plan for part, plan in plans.items() if plan.label != "fp32"}
    if report.ok or report.problem or not rounded:
        return report
    codes = {part: quantized_weights(checkpoint.components[part], plan, run) for part, plan in rounded.items()}
    drawn = run(RoundedPictures(checkpoint, probes, rounded, codes))
    return replace(report, rounded_db=min(drawn.psnr_db))


@overload
def _outcome(gate: GateComponent, run: Runner) -> ComponentReport: ...


@overload
def _outcome(gate: GatePictures, run: Runner) -> ImageReport: ...


def _outcome(gate: GateComponent | GatePictures, run: Runner) -> ComponentReport | ImageReport:
    """What came of a gate. A runtime that died fails it, this time: the cache keeps what stages return, so none of it.

    It may have died of memory that somebody else had taken; the next conversion asks again.
    """
    stage: Stage[GatedComponent | GatedPictures] = gate
    try:
        return run(stage).report
    except ToolCrashed as crash:
        return gate.crashed(crash.what)


def pictures_are_cheap(checkpoint: Checkpoint, size: tuple[int, int]) -> bool:
    """Whether whole pictures can be drawn in seconds rather than in many minutes."""
    scale = checkpoint.vae_scale
    return checkpoint.denoiser.parameters * (size[0] // scale) * (size[1] // scale) < CHEAP_UNET


def calls_are_cheap(manifest: Manifest) -> bool:
    """As `pictures_are_cheap`, of a bundle whose checkpoint nobody has: by the size of the UNet and of its latents."""
    unet = manifest.components[sole("denoiser", manifest.components)]
    parameters = sum(file.bytes for file in unet.files) * 8 / unet.bits_per_weight
    sample = next((tensor.shape for tensor in unet.inputs if tensor.name == "sample"), ())
    return parameters * math.prod(sample[2:]) < CHEAP_UNET


def coarsest(models: Mapping[str, TargetModel]) -> str:
    """The scheme with the fewest bits among `models`: it sets the pictures' tolerance."""
    return coarsest_scheme("+".join(model.precision for model in models.values()))


def gate_schedule(checkpoint: Checkpoint, schedules: Schedules, steps: int) -> CompiledSchedule:
    """The schedule of the checkpoint's own scheduler: PyTorch drew with it, whatever the recipe's default is."""
    from ..export.scheduler import default_scheduler

    own = default_scheduler(checkpoint.scheduler)
    if (own, steps) not in schedules.compiled:
        why = schedules.skipped.get(f"{own} {steps}", "it was not asked for")
        raise CheckpointError(f"no picture can be compared: {own} at {steps} steps is not compiled: {why}")
    return schedules.read(own, steps)
