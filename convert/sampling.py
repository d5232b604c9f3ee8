"""How a bundle is sampled: what the recipe says, else what the checkpoint's variant asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..bundle.manifest_entries import ConditioningEntry, ControlEntry
from ..checkpoints.checkpoint import DEMO, DEMO_FOLDER
from ..checkpoints.families.variant import reads_zeros_for_empty
from ..export.contract import output_specs, residual_inputs
from ..runtimes.txt2img.control import USUAL_SCALE
from ..stages.artifacts import Checkpoint, GuidanceMode, TargetModel, Variant
from ..stages.errors import RecipeError
from .recipe import Recipe

UPCAST_NOTE = (
    "its activations can exceed float16 (force_upcast in its configuration): weights stored as float16 are safe, "
    "arithmetic in float16 is not"
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """What an app starts from."""

    mode: GuidanceMode
    guidance: float
    steps: int


def recipe_for(checkpoint: Checkpoint) -> str:
    """The shipped recipe that fits where the user names none."""
    return DEMO if checkpoint.root == DEMO_FOLDER else checkpoint.variant.recipe


def sampling_of(checkpoint: Checkpoint, recipe: Recipe) -> Sampling:
    """Guidance and steps of `checkpoint` under `recipe`.

    Raises:
        CheckpointError: what the UNet predicts is not certain.
        RecipeError: the recipe asks for guidance that the checkpoint cannot follow.
    """
    variant = checkpoint.variant
    mode = variant.guidance_mode if recipe.guidance.mode == "auto" else recipe.guidance.mode
    _refuse_mode(mode, variant, checkpoint, recipe)
    stated = recipe.guidance.default
    usual = variant.guidance if mode == variant.guidance_mode else 1.0 if mode == "none" else 7.5
    guidance = usual if stated is None else stated
    if mode == "none" and guidance > 1:
        raise RecipeError(
            f"{recipe.name} [guidance]: default = {guidance:g}, but {checkpoint.name} works without guidance "
            f"({variant.name}: {variant.why})",
            hint=f"use -r {variant.recipe}, or leave the key out",
        )
    steps = variant.steps if recipe.schedule.steps is None else recipe.schedule.steps
    return Sampling(mode, guidance, len(recipe.schedule.timesteps) or steps)


def _refuse_mode(mode: GuidanceMode, variant: Variant, checkpoint: Checkpoint, recipe: Recipe) -> None:
    embedded = variant.guidance_mode == "embedded"
    if (mode == "embedded") != embedded:
        why = variant.why if embedded else "its UNet has no time_cond_proj_dim"
        raise RecipeError(
            f"{recipe.name} [guidance]: mode = {mode!r} does not fit {checkpoint.name} ({why})",
            hint='leave the key out, or say mode = "auto"',
        )


def control_entry(checkpoint: Checkpoint, size: tuple[int, int]) -> ControlEntry | None:
    """What an app does with a ControlNet's outputs, for the manifest; None where there is none."""
    if "controlnet" not in checkpoint.components:
        return None
    names = tuple(spec.name for spec in output_specs(checkpoint.components["controlnet"], size))
    return ControlEntry(scale=USUAL_SCALE, residuals=residual_inputs(names))


def conditioning_entry(checkpoint: Checkpoint) -> ConditioningEntry:
    """What the manifest says about the UNet's inputs."""
    variant = checkpoint.variant
    return ConditioningEntry(
        variant=variant.label,
        why=variant.why,
        text_encoders=2 if "text_encoder_2" in checkpoint.components else 1,
        zeros_for_empty=reads_zeros_for_empty(checkpoint),
        time_ids="text_encoder_2" in checkpoint.components,
        input_channels=variant.input_channels,
    )


def noted(model: TargetModel, checkpoint: Checkpoint) -> TargetModel:
    """`model` with what its configuration warns of.

    diffusers writes `force_upcast: true` into every autoencoder, and only its pipeline for SDXL reads it: the VAEs of
    SD 1.x and 2.x are known to work in float16.
    """
    source = checkpoint.components[model.component]
    is_marked = checkpoint.family == "sdxl" and source.config.get("force_upcast") is True
    if model.component.startswith("vae_") and is_marked:
        return replace(model, notes=(*model.notes, UPCAST_NOTE))
    return model
