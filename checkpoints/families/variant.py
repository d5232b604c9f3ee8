"""What differs between checkpoints of one family: how it was distilled, what it predicts, what it is for.

Nothing here is a family's: a variant is told from the UNet's configuration and the scheduler that the checkpoint names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from ...stages.artifacts import Checkpoint
from ...stages.errors import CheckpointError

GuidanceMode = Literal["cfg", "embedded", "none"]
INPAINTING_CHANNELS: Final = 9  # latents, a mask, and the latents of what is kept: RunwayML's inpainting UNet

# Schedulers that only distilled models are sampled with.
_FEW_STEP: Final = ("LCMScheduler", "TCDScheduler")
_TURBO: Final = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
# What each family's pipeline in diffusers guides with where nobody says otherwise.
_GUIDANCE: Final = {"sd1": 7.5, "sd2": 7.5, "sdxl": 5.0}
_LCM_GUIDANCE: Final = {"sdxl": 8.0}  # latent-consistency/lcm-sdxl's card; 8.5 is LatentConsistencyModelPipeline's
_LATENT: Final = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, slots=True)
class Variant:
    """How a checkpoint wants to be sampled, and the evidence for it."""

    name: str  # for people; "base" when nothing was distilled
    why: str
    guidance_mode: GuidanceMode
    guidance: float
    steps: int
    recipe: str  # the shipped recipe that fits
    prediction_type: str
    prediction_why: str
    task: Literal["text-to-image", "inpainting"]
    input_channels: int  # of the UNet's `sample`

    @property
    def label(self) -> str:
        """One phrase for all of it."""
        return self.name if self.task == "text-to-image" else f"{self.name}, {self.task}"


def variant_of(checkpoint: Checkpoint) -> Variant:
    """Tell the variant of `checkpoint`.

    Raises:
        CheckpointError: what its UNet predicts is neither stated nor certain.
    """
    unet = checkpoint.components["unet"].config
    prediction, prediction_why = _prediction(checkpoint)
    name, why, mode, guidance, steps, recipe = _sampling(checkpoint, prediction)
    channels = int(unet["in_channels"])
    return Variant(
        name=name,
        why=why,
        guidance_mode=mode,
        guidance=guidance,
        steps=steps,
        recipe=recipe,
        prediction_type=prediction,
        prediction_why=prediction_why,
        task="inpainting" if channels == INPAINTING_CHANNELS else "text-to-image",
        input_channels=channels,
    )


def reads_zeros_for_empty(checkpoint: Checkpoint) -> bool:
    """Whether an empty negative prompt means zeros in place of its states: SDXL's pipelines, unless told otherwise."""
    if "text_encoder_2" not in checkpoint.components:
        return False
    return bool(checkpoint.settings.get("force_zeros_for_empty_prompt", True))


def _sampling(checkpoint: Checkpoint, prediction: str) -> tuple[str, str, GuidanceMode, float, int, str]:
    unet, scheduler = checkpoint.components["unet"].config, checkpoint.scheduler
    own, family = str(scheduler["_class_name"]), checkpoint.family
    width = unet.get("time_cond_proj_dim")
    if width is not None:
        why = f"unet.time_cond_proj_dim = {width}: it reads the guidance scale"
        return "latent consistency model", why, "embedded", _LCM_GUIDANCE.get(family, 8.5), 4, "lcm-fp16"
    if own in _FEW_STEP:
        why = f"its scheduler is {own}, and its UNet reads no guidance scale"
        return "few-step", why, "none", 1.0, 4, "few-step-fp16"
    trailing = scheduler.get("timestep_spacing") == "trailing"
    plain = prediction == "epsilon" and not scheduler.get("rescale_betas_zero_snr")
    if own in _TURBO and trailing and plain:
        # Turbo and Lightning; an undistilled model with trailing steps was trained to zero terminal SNR
        return "turbo", f"its scheduler is {own} with timestep_spacing = 'trailing'", "none", 1.0, 4, "turbo-fp16"
    return "base", "no sign of distillation", "cfg", _GUIDANCE[family], 20, f"{family}-fp16"


def _prediction(checkpoint: Checkpoint) -> tuple[str, str]:
    stated: Any = checkpoint.scheduler.get("prediction_type")
    if stated is not None:
        if stated not in _LATENT:
            raise CheckpointError(
                f"{checkpoint.root}: scheduler_config.json: prediction_type {stated!r} is not supported",
                hint=f"one of: {', '.join(_LATENT)}",
            )
        return str(stated), checkpoint.prediction_why or "scheduler_config.json states it"
    if checkpoint.family == "sd2":
        raise CheckpointError(
            f"{checkpoint.root}: scheduler_config.json states no prediction_type, and Stable Diffusion 2 comes in two: "
            "models for 768 pixels predict v, those for 512 the noise",
            hint='add "prediction_type": "v_prediction" or "epsilon" there, as the model card says',
        )
    return "epsilon", "scheduler_config.json does not state it: noise, as all of this family did when that was left out"
