"""Models of a few lines that draw, some in noisy arithmetic, and what ports of the loop around them do wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from diffusette.checkpoints.checkpoint import DEMO_FOLDER
from diffusette.export.compiled_schedule import CompiledSchedule, ScheduleRow
from diffusette.runtimes.protocol import Array, Closing
from diffusette.runtimes.txt2img import conditioning, generate
from diffusette.runtimes.txt2img.canvas import Canvas
from diffusette.runtimes.txt2img.generate import TextToImage
from diffusette.runtimes.txt2img.tokenizer import PromptTokenizer
from diffusette.runtimes.txt2img.trajectory import Trajectory
from diffusette.stages.artifacts import TensorSpec
from diffusette.validate.goldens import checks as golden_checks
from diffusette.validate.goldens import replay as golden_replay

LATENTS: Final = (1, 4, 16, 8)
SIZE: Final = (32, 16)
CLEAN: Final = 400.0  # dB, of arithmetic that is exact


@dataclass
class Toy(Closing):
    """A model that is a function, whose answers are rounded to `snr_db`."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    function: Callable[..., Array | tuple[Array, ...]]
    snr_db: float = CLEAN

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        found, answer = {}, self.function(**feeds)
        answers = answer if isinstance(answer, tuple) else (answer,)
        for spec, exact in zip(self.outputs, answers, strict=True):
            noise = np.random.default_rng(5).standard_normal(exact.shape)
            rms = float(np.sqrt(np.mean(exact.astype(np.float64) ** 2)))
            found[spec.name] = (exact + noise * rms * 10 ** (-self.snr_db / 20)).astype(np.float32)
        return found

    def close(self) -> None:
        pass


def _states(input_ids: Array, **_: Array) -> Array:
    return np.sin(input_ids[0, :, None] * np.arange(1, 9) * 0.37)[None]


def _pooled(input_ids: Array) -> tuple[Array, ...]:
    states = _states(input_ids)
    return states, states.mean(1)


def _noise(sample: Array, encoder_hidden_states: Array, **times: Array) -> Array:
    told = float(encoder_hidden_states.mean()) + sum(float(x.ravel() @ np.arange(x.size)) / 1e3 for x in times.values())
    return 0.8 * np.tanh(sample[:, :4] + told) + 0.3 * np.roll(sample[:, :4], 1, axis=-1)


def _pixels(latent_sample: Array) -> Array:
    return 1.2 * np.tanh(latent_sample[:, :3].repeat(2, 2).repeat(2, 3) / 2)


def _parameters(sample: Array) -> Array:
    small = sample[:, :, ::2, ::2]
    return np.concatenate([2 * small, small[:, :1], small - 3, small[:, :1] - 4], axis=1)


def _floats(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


_IDS: Final = (TensorSpec("input_ids", "int32", (1, 77)),)


def toy(component: str, snr_db: float = CLEAN, channels: int = 4, *, large: bool = False) -> Toy:
    """A component; `large`: of a family with two text encoders and time ids."""
    batch, _, height, width = LATENTS
    sample, picture = _floats("sample", batch, channels, height, width), _floats("sample", 1, 3, *SIZE)
    states = _floats("encoder_hidden_states", 1, 77, 16 if large else 8)
    pooled = _floats("text_embeds", 1, 8)
    told = (states, pooled, _floats("time_ids_embedding", 1, 192)) if large else (states,)
    penultimate = "penultimate_hidden_state" if large else "last_hidden_state"
    noise = _floats("out_sample", *LATENTS)
    parts: dict[str, tuple[tuple[TensorSpec, ...], TensorSpec, Callable[..., Any]]] = {
        "text_encoder": (_IDS, _floats(penultimate, 1, 77, 8), _states),
        "unet": ((sample, _floats("timestep_embedding", 1, 32), *told), noise, _noise),
        "vae_decoder": ((_floats("latent_sample", *LATENTS),), _floats("sample", 1, 3, *SIZE), _pixels),
        "vae_encoder": ((picture,), _floats("latent_parameters", 1, 8, height, width), _parameters),
    }
    if component == "text_encoder_2":
        return Toy(_IDS, (_floats(penultimate, 1, 77, 8), pooled), _pooled, snr_db)
    inputs, output, function = parts[component]
    return Toy(inputs, (output,), function, snr_db)


def rows(*, rich: bool) -> CompiledSchedule:
    """Six steps; `rich`: with a scaled input, an earlier output and fresh noise, as solvers have that need them."""

    def row(index: int, timestep: float) -> ScheduleRow:
        if not rich:
            return ScheduleRow(timestep, 1.0, 0.95, (-0.11,), 0.0, 0.9 - 0.1 * index, 0.4)
        outputs = (-0.15, 0.04) if index else (-0.11,)
        return ScheduleRow(timestep, 0.7 + index / 20, 0.95, outputs, 0.1, 0.9, 0.4)

    timesteps = (901.0, 701.0, 501.0, 301.0, 101.0, 1.0)
    every = tuple(row(index, timestep) for index, timestep in enumerate(timesteps))
    return CompiledSchedule("toy", "Toy", 6, 0.0, 1.0, "epsilon", "leading", every)


def toys(snr_db: float = CLEAN, *, rich: bool = False, channels: int = 4, large: bool = False) -> TextToImage:
    """What draws with them."""
    tokenizer = PromptTokenizer(DEMO_FOLDER / "tokenizer", 77, 680)
    return TextToImage(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer if large else None,
        open=lambda name: toy(name, snr_db, channels, large=large),
        schedules=(rows(rich=rich),),
        guidance_mode="cfg",
        default_guidance=4.0,
        scaling_factor=0.9,
        shift=0.0,
        encoder_scaling=(0.9, 0.0),
        size=SIZE,
        denoiser="unet",
        time_embedding={"dim": 32, "flip_sin_to_cos": True, "freq_shift": 0.0, "max_period": 10000.0},
        zeros_for_empty=large,
        input_channels=channels,
    )


def a_canvas(*, masked: bool = False) -> Canvas:
    rng = np.random.default_rng(3)
    image = rng.uniform(-1, 1, (1, 3, *SIZE)).astype(np.float32)
    mask = (rng.uniform(size=(1, 1, *SIZE)) > 0.5).astype(np.float32) if masked else None
    return Canvas(image, mask, 1.0 if masked else 0.5)


Port = Callable[[TextToImage, Any], TextToImage]  # models and pytest's monkeypatch -> models as a port has them


def _row(index: int | None, change: Callable[[ScheduleRow], ScheduleRow]) -> Port:
    def port(models: TextToImage, patch: Any) -> TextToImage:
        schedule = models.schedules[0]
        chosen = range(len(schedule.rows)) if index is None else [index % len(schedule.rows)]
        changed = tuple(change(row) if at in chosen else row for at, row in enumerate(schedule.rows))
        return replace(models, schedules=(replace(schedule, rows=changed),))

    return port


def _patched(place: Any, name: str, make: Callable[[Any], Any]) -> Port:
    def port(models: TextToImage, patch: Any) -> TextToImage:
        patch.setattr(place, name, make(getattr(place, name)))
        return models

    return port


def _factor(models: TextToImage, _: Any) -> TextToImage:
    return replace(models, scaling_factor=models.scaling_factor * 1.001)


def _encoder_factor(models: TextToImage, _: Any) -> TextToImage:
    factor, shift = models.encoder_scaling or (models.scaling_factor, models.shift)
    return replace(models, encoder_scaling=(factor * 1.001, shift))


def _strong(models: TextToImage, _: Any) -> TextToImage:
    schedule = models.schedules[0]
    return replace(models, schedules=(replace(schedule, init_noise_sigma=schedule.init_noise_sigma * 1.001),))


def _flipped(models: TextToImage, _: Any) -> TextToImage:
    flip = not models.time_embedding["flip_sin_to_cos"]
    return replace(models, time_embedding={**models.time_embedding, "flip_sin_to_cos": flip})


def _padded(models: TextToImage, _: Any) -> TextToImage:
    return replace(models, tokenizer=PromptTokenizer(DEMO_FOLDER / "tokenizer", 77, 0))


def _half(step: Callable[..., None]) -> Callable[..., None]:
    def rounded(self: Trajectory, row: ScheduleRow, output: Array) -> None:
        step(self, row, output)
        self.latents = self.latents.astype(np.float16).astype(np.float32)

    return rounded


def _off_by_one(row: ScheduleRow) -> ScheduleRow:
    return replace(row, timestep=row.timestep + 1)


def _image(change: Callable[[Array], Array]) -> Port:
    def make(draw: Callable[..., Any]) -> Callable[..., Any]:
        def drawn(*given: Any, **how: Any) -> Any:
            drawing = draw(*given, **how)
            return replace(drawing, image=change(drawing.image).astype(np.float32))

        return drawn

    return _patched(golden_replay, "draw", make)


# What a port does wrong -> where that is found, in the table of docs/goldens.md.
MISTAKES: Final[dict[str, tuple[Port, str]]] = {
    "padded with id 0": (_padded, "token ids"),
    "VAE factor 0.1 % off": (_factor, "latent_sample"),
    "guidance 4.004 for 4": (
        _patched(generate, "combine", lambda combine: lambda u, c, scale: combine(u, c, scale * 1.001)),
        "latents",
    ),
    "latents kept in float16 between steps": (_patched(Trajectory, "step", _half), "latents"),
    "the last timestep off by one": (_row(-1, _off_by_one), "timestep_embedding"),
    "initial noise 0.1 % too strong": (_strong, "sample"),
    "all timesteps off by one": (_row(None, _off_by_one), "timestep_embedding"),
    "guidance counted from the conditional output": (
        _patched(generate, "combine", lambda _: lambda u, c, scale: c + scale * (c - u)),
        "latents",
    ),
    "sine and cosine of the timestep exchanged": (_flipped, "timestep_embedding"),
    "a coefficient of one row 0.1 % off": (
        _row(3, lambda row: replace(row, outputs=(row.outputs[0] * 1.001, *row.outputs[1:]))),
        "latents",
    ),
    "pixels 0.1 % too bright": (_image(lambda image: image * 1.001), "pixels"),
    "bytes cut off instead of rounded": (
        _patched(golden_checks, "to_uint8", lambda _: lambda image: (image * 255).astype(np.uint8)),
        "bytes",
    ),
    "picture in: VAE factor 0.1 % off": (_encoder_factor, "start at strength 0.5"),
    "picture in: a row too late": (
        _patched(generate, "first_row", lambda first: lambda schedule, strength: first(schedule, strength) + 1),
        "start at strength 0.5",
    ),
}

RICH_MISTAKES: Final[dict[str, tuple[Port, str]]] = {
    "the model's input not scaled": (_row(None, lambda row: replace(row, input_scale=1.0)), "sample"),
    "an earlier output forgotten": (
        _row(2, lambda row: replace(row, outputs=(row.outputs[0], 0.0))),
        "latents",
    ),
    "fresh noise left out": (_row(4, lambda row: replace(row, noise=0.0)), "latents"),
}

LARGE_MISTAKES: Final[dict[str, tuple[Port, str]]] = {
    "height and width exchanged": (
        _patched(conditioning, "time_ids", lambda ids: lambda size: ids(size[::-1])),
        "time_ids_embedding",
    ),
}
