"""A prompt becomes a picture, with whatever runtime is behind the sessions. numpy only.

What is computed is what diffusers' pipeline of the family computes: the same noise for a seed, the same steps, the same
picture.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...export.compiled_schedule import CompiledSchedule
from ...stages.errors import BundleError, ModelError, UsageError
from ..protocol import Array, Session
from .canvas import INPAINTING_CHANNELS, Canvas, first_row, mask_channels, sampled
from .conditioning import ENCODERS, GUIDANCE_INPUT, conditioning, zeroed
from .control import Control, no_residuals, picture_feeds, refuse_control, residual_feeds
from .guidance import Mode, check_guidance, combine, guidance_embedding, unconditional_needed
from .model_run import run_model, run_whole
from .noise import TorchNoise
from .tokenizer import PromptTokenizer
from .trajectory import Trajectory

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
    denoiser: str  # name of the component
    tokenizer_2: PromptTokenizer | None = None  # of the second text encoder, where there is one
    zeros_for_empty: bool = False  # an empty negative prompt stands for zeros
    encoder_scaling: tuple[float, float] | None = None  # factor and shift of the VAE encoder, where they differ
    input_channels: int = 4  # of the UNet; `canvas.INPAINTING_CHANNELS` takes a mask
    controlled: bool = False  # there is a ControlNet, and the UNet takes what it gives

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

    component: str
    done: int
    total: int
    latents: Floats | None = None  # [1, 4, h, w], after each UNet call; before the first, what a picture gave
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
    control_scale: float | None = None  # None: there is no ControlNet


def generate(
    models: TextToImage,
    prompt: str,
    negative: str = "",
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    scheduler: str | None = None,
    canvas: Canvas | None = None,
    control: Control | None = None,
    keep_trajectory: bool = False,
) -> Generator[Progress, None, Drawing]:
    """Draw, one `Progress` a model run; the generator's return value is the `Drawing` (`draw` hands it over).

    Stop iterating, or close the generator, to cancel: the open model is closed then.

    Args:
        prompt: may be empty; what exceeds the text encoder's context is cut, with a warning.
        negative: what to steer away from; without effect where guidance makes no unconditional run.
        steps: a step count that has been compiled; None: the first there is.
        guidance: 1 or less: the prompt alone, at half the cost. None: the model's default.
        canvas: a picture to start from, and for an inpainting model the mask of what is drawn anew.
        control: a picture to draw along, for a bundle with a ControlNet.
        seed: of the noise, the same picture as diffusers with a CPU generator of that seed.
    Raises:
        UsageError: no such schedule, or guidance and seed out of range.
        ModelError: a model's output is not finite or has an unexpected shape.
    """
    schedule = models.schedule(scheduler, steps)
    scale = check_guidance(models.guidance_mode, models.default_guidance if guidance is None else guidance)
    _refuse_canvas(models, canvas)
    refuse_control(control, controlled=models.controlled, size=models.size)
    row = first_row(schedule, canvas.strength) if canvas else 0
    noise = TorchNoise(seed)
    texts = [prompt]
    if unconditional_needed(models.guidance_mode, scale):
        texts.insert(0, negative)
    conditions = yield from _encode(models, texts)
    start = (yield from _start(models, schedule, row, canvas, noise)) if canvas else _Start()
    trajectory = yield from _denoise(models, schedule, conditions, scale, noise, start, control, keep_trajectory)
    latents = trajectory[-1]
    yield Progress("vae_decoder", 0, 1)
    with models.open("vae_decoder") as decoder:
        feeds = {"latent_sample": (latents / models.scaling_factor + models.shift).astype(np.float32)}
        pixels = run_model(decoder, feeds, models.time_embedding, "vae_decoder")
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
        warnings=_warnings(models, texts),
        control_scale=control.scale if control else None,
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


def _encode(models: TextToImage, texts: list[str]) -> Generator[Progress, None, list[dict[str, Floats]]]:
    """The UNet's feeds for each text; of two, the first is the negative prompt."""
    empty = models.zeros_for_empty and len(texts) == 2 and not texts[0]
    asked = texts[1:] if empty else texts
    found: list[list[Mapping[str, Floats]]] = [[] for _ in asked]
    warnings = _warnings(models, texts)
    for component, tokenizer in zip(ENCODERS, (models.tokenizer, models.tokenizer_2), strict=True):
        if tokenizer is None:
            continue
        yield Progress(component, 0, len(asked), warnings=warnings)
        warnings = ()
        with models.open(component) as encoder:
            for index, text in enumerate(asked):
                ids = tokenizer(text).ids
                found[index].append(run_whole(encoder, {"input_ids": ids}, models.time_embedding, component))
                yield Progress(component, index + 1, len(asked))
    conditions = [conditioning(outputs, models.size) for outputs in found]
    return [zeroed(conditions[0]), *conditions] if empty else conditions


def _warnings(models: TextToImage, texts: list[str]) -> tuple[str, ...]:
    """What was cut off, of the prompt first. Both tokenizers of a family cut alike."""
    return tuple(warning for text in reversed(texts) if (warning := models.tokenizer(text).warning))


def _refuse_canvas(models: TextToImage, canvas: Canvas | None) -> None:
    inpaints = models.input_channels == INPAINTING_CHANNELS
    if inpaints and (canvas is None or canvas.mask is None):
        raise UsageError(
            "this model is for inpainting: it needs a picture and a mask",
            hint="give --image FILE --mask FILE; white in the mask is redrawn",
        )
    if canvas is None:
        return
    if canvas.mask is not None and not inpaints:
        raise UsageError("this model takes no mask: it is not made for inpainting", hint="leave --mask out")
    if canvas.image.shape != (1, 3, *models.size):
        raise UsageError(f"the picture is {list(canvas.image.shape)}, this bundle draws {[1, 3, *models.size]}")


@dataclass(frozen=True, slots=True)
class _Start:
    """Where a run begins: by default with noise, at the first row."""

    row: int = 0
    latents: Floats | None = None
    channels: Floats | None = None  # what an inpainting UNet takes beside the latents


def _start(
    models: TextToImage, schedule: CompiledSchedule, row: int, canvas: Canvas, noise: TorchNoise
) -> Generator[Progress, None, _Start]:
    """Encode the canvas. Draws follow each other as in diffusers: picture, noise, what the mask keeps."""
    whole = canvas.mask is not None and canvas.strength == 1  # nothing of the picture under the mask counts
    pictures = [*([] if whole else [canvas.image]), *([canvas.kept] if canvas.mask is not None else [])]
    yield Progress("vae_encoder", 0, len(pictures))
    encoded = []
    with models.open("vae_encoder") as encoder:
        for done, picture in enumerate(pictures, start=1):
            feeds = {"sample": picture.astype(np.float32)}
            encoded.append(run_model(encoder, feeds, models.time_embedding, "vae_encoder"))
            yield Progress("vae_encoder", done, len(pictures))

    def latents_of(parameters: Floats) -> Floats:
        factor, shift = models.encoder_scaling or (models.scaling_factor, models.shift)
        return sampled(parameters, factor, shift, noise.normal)

    shape = (1, encoded[0].shape[1] // 2, *encoded[0].shape[2:])
    if whole:
        latents = schedule.init_noise_sigma * noise.normal(shape)
    else:
        picture, first = latents_of(encoded[0]), schedule.rows[row]
        latents = first.signal * picture + first.noise_level * noise.normal(shape)
    channels = mask_channels(canvas.mask, latents_of(encoded[-1])) if canvas.mask is not None else None
    return _Start(row, latents.astype(np.float32, copy=False), channels)


def _denoise(
    models: TextToImage,
    schedule: CompiledSchedule,
    conditions: list[dict[str, Floats]],
    scale: float,
    noise: TorchNoise,
    start: _Start,
    control: Control | None,
    keep: bool,
) -> Generator[Progress, None, list[Floats]]:
    """Latents after each model call, or only the last ones unless `keep`."""
    rows = schedule.rows[start.row :]
    yield Progress(models.denoiser, 0, len(rows), start.latents)
    kept: list[Floats] = []
    with ExitStack() as opened:
        unet = opened.enter_context(models.open(models.denoiser))
        controlnet = opened.enter_context(models.open("controlnet")) if control and control.scale else None
        shapes = {spec.name: spec.shape for spec in unet.inputs}
        if "sample" not in shapes:
            raise BundleError(f"{models.denoiser} has no input 'sample' among {sorted(shapes)}")
        trajectory = Trajectory(schedule, unet.outputs[0].shape, noise.normal, start.latents)
        fixed: dict[str, Array] = dict(no_residuals(unet.inputs) if control and not controlnet else {})
        if models.guidance_mode == "embedded":
            fixed[GUIDANCE_INPUT] = guidance_embedding(scale, shapes[GUIDANCE_INPUT][-1])
        for call, row in enumerate(rows):
            seen, timestep = trajectory.seen(row), np.array(row.timestep, np.float32)
            sample = seen if start.channels is None else np.concatenate([seen, start.channels], axis=1)
            outputs = []
            # one run a prompt, batch 1: half the peak memory of a batch of two, and one static shape
            for told in conditions:
                feeds: dict[str, Array] = {"sample": sample, "timestep": timestep, **fixed, **told}
                if control and controlnet:
                    feeds |= _residuals(models, controlnet, control, {**feeds, "sample": seen}, call)
                outputs.append(run_model(unet, feeds, models.time_embedding, f"{models.denoiser} in call {call}"))
            trajectory.step(row, outputs[0] if len(outputs) == 1 else combine(outputs[0], outputs[1], scale))
            if not keep:
                kept.clear()
            kept.append(trajectory.latents)
            yield Progress(models.denoiser, call + 1, len(rows), trajectory.latents)
    return kept


def _residuals(
    models: TextToImage, controlnet: Session, control: Control, feeds: Mapping[str, Array], call: int
) -> dict[str, Floats]:
    """What the ControlNet adds to the UNet; it sees the latents alone, without what an inpainting UNet takes beside."""
    where = f"controlnet in call {call}"
    outputs = run_whole(controlnet, {**feeds, **picture_feeds(control)}, models.time_embedding, where)
    return residual_feeds(outputs, control.scale)
