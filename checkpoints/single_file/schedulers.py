"""The noise schedules that Stable Diffusion was trained with, which single files do not state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ...stages.errors import CheckpointError
from .evidence import Evidence

# configs/stable-diffusion/v1-inference.yaml; v2 and SDXL kept it. The rest is what the families' own repositories
# have in scheduler_config.json.
_TRAINED: Final[Mapping[str, Any]] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
    "steps_offset": 1,
}
_OWN: Final[Mapping[str, Mapping[str, Any]]] = {
    "sd1": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
    "sd2": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    "sdxl": {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "timestep_spacing": "leading"},
}
# the defaults of diffusers' LCMScheduler, spelled out
_CONSISTENT: Final[Mapping[str, Any]] = {
    "_class_name": "LCMScheduler",
    "original_inference_steps": 50,
    "timestep_spacing": "leading",
    "clip_sample": False,
}
# as stabilityai/sd-turbo, stabilityai/sdxl-turbo and ByteDance/SDXL-Lightning are published; all of them predict noise
_DISTILLED: Final[Mapping[str, Mapping[str, Any]]] = {
    "turbo": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "lightning": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
    "lcm": _CONSISTENT,
}


def scheduler_config(
    kind: str, evidence: Evidence, where: str, *, consistent: bool = False
) -> tuple[dict[str, Any], str]:
    """scheduler_config.json of a single file, and the words for how its prediction type is known.

    Args:
        kind: "sd1", "sd2" or "sdxl".
        consistent: its UNet reads the guidance scale, as those of latent consistency models do.
    Raises:
        CheckpointError: an SD 2.x file does not say whether it predicts noise or velocity: both exist in equal shapes.
    """
    distilled, whence = evidence.distilled or ("", "")
    if evidence.prediction is not None:
        prediction, says = evidence.prediction
    elif distilled:
        prediction, says = "epsilon", f"assumed: as every {distilled} model, which {whence} says that it is"
    elif kind == "sd2":
        raise CheckpointError(
            f"{where}: Stable Diffusion 2.x predicts noise (the 512 pixel base) or velocity (the 768 pixel model), "
            "and nothing in this file says which",
            hint="say it: --prediction epsilon or --prediction v_prediction (a wrong one draws noise)",
        )
    else:
        prediction, says = "epsilon", "assumed: as every checkpoint of its family that does not say otherwise"
    config = {**_TRAINED, **_solver(kind, "lcm" if consistent else distilled), "prediction_type": prediction}
    if evidence.betas is not None:
        config |= {"beta_start": evidence.betas[0], "beta_end": evidence.betas[1]}
    if evidence.zero_snr:  # "Common Diffusion Noise Schedules and Sample Steps are Flawed" (Lin et al. 2024)
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if config["_class_name"] == "PNDMScheduler":  # it cannot rescale
            config |= {"_class_name": "DDIMScheduler", "clip_sample": False}
            del config["skip_prk_steps"]
    return config, says


def _solver(kind: str, distilled: str) -> Mapping[str, Any]:
    """The family's own, or that of what was distilled from it; SD-Turbo's is without noise."""
    name = "lightning" if (kind, distilled) == ("sd2", "turbo") else distilled
    return _DISTILLED.get(name, _OWN[kind])
