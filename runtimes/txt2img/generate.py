"""A prompt becomes a picture, with whatever runtime is behind the sessions. numpy only.

What is computed is diffusers' StableDiffusionPipeline: the same noise for a seed, the same steps, the same picture.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import BundleError, ModelError, UsageError
from ...pipeline.schedule import CompiledSchedule
from ..inputs import native_feeds
from ..protocol import Array, Session
from .guidance import Mode, check_guidance, combine, guidance_embedding, unconditional_needed
from .noise import TorchNoise
from .schedule import Trajectory
from .tokenizer import PromptTokenizer, TokenizedPrompt

GUIDANCE_INPUT = "timestep_cond"  # optimum's name for an embedded guidance scale

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TextToImage:
    """What it takes to draw. Models are opened when their turn comes and closed before the next one opens."""

    tokenizer: PromptTokenizer
    open: Callable[[str], Session]  # component name -> a loaded model
    schedules: tuple[CompiledSchedule, ...]  # the first is used unless another is asked for
    guidance_mode: Mode
    default_guidance: float
    scaling_factor: float  # of the VAE: latents have unit variance in the UNet, 1/scaling_factor of it in the VAE
    shift: float  # of the VAE, 0 for Stable Diffusion
    size: tuple[int, int]  # height, width in pixels
    time_embedding: Mapping[str, Any]  # `inputs.time_embedding_facts`

    def schedule(self, scheduler: str | None = None, steps: int | None = None) -> CompiledSchedule:
        """The first compiled schedule that fits what is asked for.

        Raises:
            UsageError: none does.
        """
        for schedule in self.schedules:
            if scheduler in (None, schedule.scheduler) and steps in (None, schedule.steps):
                return schedule
        wanted = " ".join([*([scheduler] if scheduler else []), *([f"{steps} steps"] if steps is not None else [])])
        known = ", ".join(f"{schedule.scheduler} {schedule.steps} steps" for schedule in self.schedules)
        raise UsageError(f"no compiled schedule for {wanted}", hint=f"there are: {known}")


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` runs of a component have been made. `latents` is a view: copy it to keep it."""

    component: Literal["text_encoder", "unet", "vae_decoder"]
    done: int
    total: int
    latents: Floats | None = None  # [1, 4, h, w], after each UNet call
    warnings: tuple[str, ...] = ()  # what the user should know, with the first event


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture, how it came about, and what it was before rounding."""

    image: Floats  # [H, W, 3], 0..1
    latents: Floats  # [1, 4, h, w], as the UNet left them
    trajectory: tuple[Floats, ...]  # latents after each model call, empty unless asked for
    prompt: str
    negative: str
    seed: int
    steps: int
    scheduler: str
    guidance: float
    warnings: tuple[str, ...]


def generate(
    models: TextToImage,
    prompt: str,
    negative: str = "",
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    scheduler: str | None = None,
    keep_trajectory: bool = False,
) -> Generator[Progress, None, Drawing]:
    """Draw, one `Progress` a model run; the generator's return value is the `Drawing` (`draw` hands it over).

    Stop iterating, or close the generator, to cancel: the open model is closed then.

    Args:
        prompt: may be empty; what exceeds the text encoder's context is cut, with a warning.
        negative: what to steer away from; without effect where guidance makes no unconditional run.
        steps: a step count that has been compiled; None: the first there is.
        guidance: 1 or less: the prompt alone, at half the cost. None: the model's default.
        seed: of the noise, the same picture as diffusers with a CPU generator of that seed.
    Raises:
        UsageError: no such schedule, or guidance and seed out of range.
        ModelError: a model's output is not finite or has an unexpected shape.
    """
    schedule = models.schedule(scheduler, steps)
    scale = check_guidance(models.guidance_mode, models.default_guidance if guidance is None else guidance)
    noise = TorchNoise(seed)
    tokens = [models.tokenizer(prompt)]
    if unconditional_needed(models.guidance_mode, scale):
        tokens.insert(0, models.tokenizer(negative))
    warnings = tuple(text.warning for text in reversed(tokens) if text.warning)

    states = yield from _encode(models, tokens, warnings)
    trajectory = yield from _denoise(models, schedule, states, scale, noise, keep_trajectory)
    latents = trajectory[-1]
    yield Progress("vae_decoder", 0, 1)
    with models.open("vae_decoder") as decoder:
        feeds = {"latent_sample": (latents / models.scaling_factor + models.shift).astype(np.float32)}
        pixels = _run(models, decoder, feeds, "vae_decoder")
    if pixels.shape != (1, 3, *models.size):
        raise ModelError(f"vae_decoder gives {pixels.shape}, pictures are {(1, 3, *models.size)}")
    yield Progress("vae_decoder", 1, 1)
    return Drawing(
        image=np.clip(pixels[0].transpose(1, 2, 0) / 2 + 0.5, 0, 1),
        latents=latents,
        trajectory=tuple(trajectory) if keep_trajectory else (),
        prompt=prompt,
        negative=negative,
        seed=seed,
        steps=schedule.steps,
        scheduler=schedule.scheduler,
        guidance=scale,
        warnings=warnings,
    )


def draw(
    models: TextToImage, prompt: str, negative: str = "", *, watch: Callable[[Progress], None] | None = None, **how: Any
) -> Drawing:
    """Run `generate` to its end, handing each `Progress` to `watch`. `how` takes its keywords."""
    with closing(generate(models, prompt, negative, **how)) as steps:
        while True:
            try:
                progress = next(steps)
            except StopIteration as end:
                drawing: Drawing = end.value
                return drawing
            if watch:
                watch(progress)


def _encode(
    models: TextToImage, tokens: list[TokenizedPrompt], warnings: tuple[str, ...]
) -> Generator[Progress, None, list[Floats]]:
    """Text encoder states, [1, tokens, D] a prompt."""
    yield Progress("text_encoder", 0, len(tokens), warnings=warnings)
    states = []
    with models.open("text_encoder") as encoder:
        for text in tokens:
            states.append(_run(models, encoder, {"input_ids": text.ids}, "text_encoder"))
            yield Progress("text_encoder", len(states), len(tokens))
    return states


def _denoise(
    models: TextToImage,
    schedule: CompiledSchedule,
    states: list[Floats],
    scale: float,
    noise: TorchNoise,
    keep: bool,
) -> Generator[Progress, None, list[Floats]]:
    """Latents after each model call, or only the last ones unless `keep`."""
    yield Progress("unet", 0, len(schedule.rows))
    kept: list[Floats] = []
    with models.open("unet") as unet:
        shapes = {spec.name: spec.shape for spec in unet.inputs}
        if "sample" not in shapes:
            raise BundleError(f"unet has no input 'sample' among {sorted(shapes)}")
        trajectory = Trajectory(schedule, shapes["sample"], noise.normal)
        guidance = {}
        if models.guidance_mode == "embedded":
            guidance[GUIDANCE_INPUT] = guidance_embedding(scale, shapes[GUIDANCE_INPUT][-1])
        for call, row in enumerate(schedule.rows):
            feeds: dict[str, Array] = {
                "sample": trajectory.seen(row),
                "timestep": np.array(row.timestep, np.float32),
                **guidance,
            }
            # one run a prompt, batch 1: half the peak memory of a batch of two, and one static shape
            outputs = [
                _run(models, unet, {**feeds, "encoder_hidden_states": state}, f"unet in call {call}")
                for state in states
            ]
            trajectory.step(row, outputs[0] if len(outputs) == 1 else combine(outputs[0], outputs[1], scale))
            if not keep:
                kept.clear()
            kept.append(trajectory.latents)
            yield Progress("unet", call + 1, len(schedule.rows), trajectory.latents)
    return kept


def _run(models: TextToImage, session: Session, feeds: Mapping[str, Array], where: str) -> Floats:
    """The only output of a model that is fed by PyTorch's names."""
    outputs = session.run(native_feeds(feeds, session.inputs, models.time_embedding))
    if len(outputs) != 1:
        raise ModelError(f"{where} gives {len(outputs)} outputs ({', '.join(outputs)}), one is expected")
    (output,) = outputs.values()
    if not np.isfinite(output).all():
        raise ModelError(
            f"{where} gives NaN or infinity", hint="float16 may overflow in this model; convert with --precision fp32"
        )
    return output.astype(np.float32, copy=False)
