"""The curve of a bundle's UNet along the trajectory: PyTorch's answers from stages, the bundle's as it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ...bundle.recorded_rounding import recorded_rounding
from ...runtimes.registry import get_target
from ...stages.progress import Progress
from ...stages.stage import Runner
from ..gate import ask_rounded, pictures_are_cheap
from ..reference.calibrate import ranged
from ..reference.calibration import step_weights
from ..reference.probes import ProbePlan, Probes
from .activation_bits import ActivationBits, activation_bits
from .curve import TimestepCurve, curve_plan, measure_timesteps

if TYPE_CHECKING:
    from ...bundle.bundle import Bundle
    from ...quantize.plan import Plan
    from ...stages.artifacts import Checkpoint
    from ..gates import OpenComponent


def timesteps_of(
    bundle: Bundle,
    checkpoint: Checkpoint,
    plans: Mapping[str, Plan],
    *,
    gate_probes: Probes,
    pictures: ProbePlan,
    open_component: OpenComponent,
    run: Runner,
    progress: Progress,
) -> TimestepCurve:
    """Where along the trajectory of `pictures` the UNet's error arises.

    Where a call takes seconds, the calls that the gate has kept are all there is: nothing more is asked of PyTorch.

    Args:
        plans: of every component, with the samples that its codes were rounded by.
        pictures: how they are drawn.
    """
    from ..reference.pytorch import ReferenceProbes

    size, unet = bundle.manifest.size, checkpoint.denoiser
    plan = plans[unet.component]
    cheap = pictures_are_cheap(checkpoint, size)
    probes = run(ReferenceProbes(checkpoint, size, curve_plan(pictures))) if cheap else gate_probes
    answers = None if plan.label == "fp32" else ask_rounded(probes, unet, plan, run)
    times = {float(probe.feeds["timestep"]) for probe in probes.read(unet.component)}
    label = f"{bundle.manifest.target.name} timesteps"
    with progress.running(label), open_component(unet.component) as session:
        curve = measure_timesteps(
            session,
            unet.component,
            probes,
            answers,
            bundle.manifest.time_embedding.model_dump(),
            dict(step_weights(checkpoint.scheduler, times)),
        )
    return replace(curve, activations=_activations(bundle, checkpoint, plan, probes, run) if cheap else None)


def _activations(
    bundle: Bundle, checkpoint: Checkpoint, plan: Plan, probes: Probes, run: Runner
) -> ActivationBits | None:
    """What 8-bit activations of the UNet use of their ranges; None: it has none."""
    from ...quantize.calibrated import layer_shapes
    from ...quantize.ranges import ObserveInputs
    from ...quantize.samples import Samples

    unet = checkpoint.denoiser
    coded = [
        path for path, shape in layer_shapes(unet).items() if plan.scheme(f"{path}.weight", shape).activation_bits == 8
    ]
    if not coded:
        return None
    seen = run(ObserveInputs(unet, Samples((probes.folder,), (probes.digest,)))).by_timestep()
    target = get_target(bundle.manifest.target.name)
    ranges = ranged({unet.component: plan}, checkpoint, target, bundle.manifest.size, recorded_rounding(bundle), run)[
        unet.component
    ].ranges
    return activation_bits({path: seen[path] for path in coded if path in seen}, ranges.read() if ranges else None)
