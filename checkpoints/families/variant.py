"""What differs between checkpoints of one family: how it was distilled, what it predicts, what it is for.

Nothing here is a family's: a variant is told from the UNet's configuration and the scheduler that the checkpoint names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ...stages.artifacts import Checkpoint, GuidanceMode, Variant
from ...stages.errors import CheckpointError
from .family import Family

INPAINTING_CHANNELS: Final = 9  # latents, a mask, and the latents of what is kept: RunwayML's inpainting UNet

# Schedulers that only distilled models are sampled with.
_FEW_STEP: Final = ("LCMScheduler", "TCDScheduler")
_TURBO: Final = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
_LATENT: Final = ("epsilon", "v_prediction", "sample")


def tell_variant(
    family: Family, unet: Mapping[str, Any], scheduler: Mapping[str, Any], place: Path, prediction_why: str = ""
) -> Variant:
    """Tell the variant of a checkpoint.

    Args:
        unet: its UNet's configuration.
        scheduler: scheduler_config.json, `_class_name` included.
        place: where it lies, for errors.
        prediction_why: who says what the UNet predicts; "": scheduler_config.json, if anything.
    Raises:
        CheckpointError: what its UNet predicts is neither stated nor certain.
    """
    prediction, prediction_why = _prediction(family, scheduler, place, prediction_why)
    name, why, mode, guidance, steps, recipe = _sampling(family, unet, scheduler, prediction)
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


def _sampling(
    family: Family, unet: Mapping[str, Any], scheduler: Mapping[str, Any], prediction: str
) -> tuple[str, str, GuidanceMode, float, int, str]:
    own = str(scheduler["_class_name"])
    width = unet.get("time_cond_proj_dim")
    if width is not None:
        why = f"unet.time_cond_proj_dim = {width}: it reads the guidance scale"
        return "latent consistency model", why, "embedded", family.lcm_guidance, 4, "lcm-fp16"
    if own in _FEW_STEP:
        why = f"its scheduler is {own}, and its UNet reads no guidance scale"
        return "few-step", why, "none", 1.0, 4, "few-step-fp16"
    trailing = scheduler.get("timestep_spacing") == "trailing"
    plain = prediction == "epsilon" and not scheduler.get("rescale_betas_zero_snr")
    if own in _TURBO and trailing and plain:
        # Turbo and Lightning; an undistilled model with trailing steps was trained to zero terminal SNR
        return "turbo", f"its scheduler is {own} with timestep_spacing = 'trailing'", "none", 1.0, 4, "turbo-fp16"
    return "base", "no sign of distillation", "cfg", family.guidance, 20, f"{family.name}-fp16"


def _prediction(family: Family, scheduler: Mapping[str, Any], place: Path, why: str) -> tuple[str, str]:
    stated: Any = scheduler.get("prediction_type")
    if stated is not None:
        if stated not in _LATENT:
            raise CheckpointError(
                f"{place}: scheduler_config.json: prediction_type {stated!r} is not supported",
                hint=f"one of: {', '.join(_LATENT)}",
            )
        return str(stated), why or "scheduler_config.json states it"
    if family.prediction is None:
        raise CheckpointError(
            f"{place}: scheduler_config.json states no prediction_type, and {family.title} comes in two: "
            "models for 768 pixels predict v, those for 512 the noise",
            hint='add "prediction_type": "v_prediction" or "epsilon" there, as the model card says',
        )
    return (
        family.prediction,
        "scheduler_config.json does not state it: as all of this family did when that was left out",
    )
