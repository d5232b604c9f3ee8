"""generate() draws what diffusers' StableDiffusionPipeline draws, from the same modules.

The sessions here are PyTorch modules of the embedded checkpoint behind the runtimes' protocol, so that whatever
differs is this package's loop, noise, schedule, tokenizer or guidance, and not a runtime.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusette.checkpoints.tokenizer import write_tokenizer
from diffusette.export.compile_schedule import compile_schedule
from diffusette.export.scheduler import SCHEDULERS
from diffusette.runtimes.inputs import time_embedding_facts
from diffusette.runtimes.txt2img.generate import Drawing, Progress, TextToImage, draw, generate
from diffusette.runtimes.txt2img.tokenizer import PromptTokenizer
from diffusette.stages.artifacts import TensorSpec
from diffusette.stages.errors import BundleError, ModelError, UsageError

from .module_session import ModuleSession

DEMO: Final = Path(__file__).resolve().parents[3] / "demo"
PROMPT: Final = "a red circle"
LONG: Final = "a red circle above a blue square, " * 20


@pytest.fixture(scope="module")
def pipeline() -> Any:
    loaded = StableDiffusionPipeline.from_pretrained(DEMO, local_files_only=True, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def journal() -> list[str]:
    return []


@pytest.fixture(scope="module")
def models(pipeline: Any, journal: list[str], tmp_path_factory: pytest.TempPathFactory) -> TextToImage:
    folder = tmp_path_factory.mktemp("tokenizer")
    facts = write_tokenizer(DEMO / "tokenizer", folder)
    config = dict(pipeline.scheduler.config)
    counts = {"ddim": 20, "lcm": 8}
    return TextToImage(
        tokenizer=PromptTokenizer(folder, facts["max_tokens"], facts["pad_id"]),
        open=lambda component: ModuleSession(component, pipeline, journal),
        schedules=(
            *(compile_schedule(config, name, counts.get(name, 10)) for name in SCHEDULERS),
            compile_schedule(config, "ddim", 3),
        ),
        guidance_mode="cfg",
        default_guidance=4.0,
        scaling_factor=pipeline.vae.config.scaling_factor,
        shift=0.0,
        size=(64, 64),
        denoiser="unet",
        time_embedding=time_embedding_facts(pipeline.unet.config),
    )


def reference(pipeline: Any, scheduler: str, steps: int, **how: Any) -> np.ndarray:
    """diffusers' float picture, [H, W, 3] in 0..1."""
    config, own = pipeline.scheduler.config, pipeline.scheduler
    seed = how.pop("seed", 0)
    try:
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(config)
        drawn = pipeline(
            num_inference_steps=steps,
            height=64,
            width=64,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
            **how,
        )
    finally:
        pipeline.scheduler = own
    return drawn.images[0]


def psnr_db(candidate: np.ndarray, reference: np.ndarray) -> float:
    assert candidate.shape == reference.shape
    return float(-10 * np.log10(max(np.mean((candidate - reference) ** 2), 1e-30)))


def test_ddim_20_steps_is_the_pipelines_picture(models: TextToImage, pipeline: Any) -> None:
    drawing = draw(models, PROMPT, seed=11, guidance=4.0)
    expected = reference(pipeline, "ddim", 20, prompt=PROMPT, guidance_scale=4.0, seed=11)
    assert expected.std() > 0.05  # a picture, not one colour
    assert psnr_db(drawing.image, expected) >= 90
    assert (drawing.scheduler, drawing.steps, drawing.guidance, drawing.warnings) == ("ddim", 20, 4.0, ())


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "ddim"])
def test_every_scheduler_draws_the_pipelines_picture(scheduler: str, models: TextToImage, pipeline: Any) -> None:
    drawing = draw(models, PROMPT, scheduler=scheduler, seed=3)
    expected = reference(pipeline, scheduler, drawing.steps, prompt=PROMPT, guidance_scale=4.0, seed=3)
    assert psnr_db(drawing.image, expected) >= 90


@pytest.mark.parametrize(
    ("prompt", "negative", "guidance"),
    [("", "", 4.0), (PROMPT, "a blue square", 4.0), (PROMPT, "", 1.0), (PROMPT, "", 0.0), (LONG, "", 4.0)],
    ids=["empty", "negative", "guidance 1", "guidance 0", "long"],
)
def test_prompts_and_guidance_work_as_in_the_pipeline(
    prompt: str, negative: str, guidance: float, models: TextToImage, pipeline: Any
) -> None:
    drawing = draw(models, prompt, negative, guidance=guidance, steps=3)
    expected = reference(pipeline, "ddim", 3, prompt=prompt, negative_prompt=negative, guidance_scale=guidance)
    assert psnr_db(drawing.image, expected) >= 90


def test_a_prompt_that_is_cut_gives_the_pipelines_warning(
    models: TextToImage, pipeline: Any, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("diffusers")
    caplog.set_level(logging.WARNING, logger="diffusers")  # whatever other tests have set
    logger.addHandler(caplog.handler)
    try:
        reference(pipeline, "ddim", 1, prompt=LONG, guidance_scale=1.0)
    finally:
        logger.removeHandler(caplog.handler)
    (warning,) = draw(models, LONG, steps=3, guidance=1.0).warnings
    assert "truncated" in warning
    assert warning in [record.getMessage() for record in caplog.records]


def test_a_seed_draws_the_same_picture_twice_and_another_seed_another(models: TextToImage) -> None:
    first, again, other = (draw(models, PROMPT, steps=3, seed=seed).image for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert psnr_db(first, other) < 40


def test_the_picture_is_float_between_0_and_1_before_rounding(models: TextToImage) -> None:
    drawing = draw(models, PROMPT, steps=3, keep_trajectory=True)
    assert (drawing.image.dtype, drawing.image.shape) == (np.float32, (64, 64, 3))
    assert 0 <= drawing.image.min() < drawing.image.max() <= 1
    assert np.any(drawing.image * 255 % 1 != 0)
    assert len(drawing.trajectory) == 3
    assert np.array_equal(drawing.trajectory[-1], drawing.latents)


def test_one_model_is_open_at_a_time_and_guidance_1_runs_each_step_once(
    models: TextToImage, journal: list[str]
) -> None:
    journal.clear()
    draw(models, PROMPT, steps=3, guidance=1.0)
    assert journal == [
        "open text_encoder", "run text_encoder", "close text_encoder",
        "open unet", "run unet", "run unet", "run unet", "close unet",
        "open vae_decoder", "run vae_decoder", "close vae_decoder",
    ]  # fmt: skip


def test_progress_counts_every_run(models: TextToImage) -> None:
    seen: list[Progress] = []
    draw(models, PROMPT, steps=3, watch=seen.append)
    assert [(at.component, at.done, at.total) for at in seen] == [
        ("text_encoder", 0, 2), ("text_encoder", 1, 2), ("text_encoder", 2, 2),
        ("unet", 0, 3), ("unet", 1, 3), ("unet", 2, 3), ("unet", 3, 3),
        ("vae_decoder", 0, 1), ("vae_decoder", 1, 1),
    ]  # fmt: skip


def test_cancelling_closes_the_open_model(models: TextToImage, journal: list[str]) -> None:
    journal.clear()
    steps = generate(models, PROMPT, steps=3)
    while next(steps).component != "unet" or not journal[-1].startswith("run unet"):
        pass
    steps.close()
    assert journal[-1] == "close unet"


def test_what_has_not_been_compiled_is_refused_with_a_list(models: TextToImage) -> None:
    with pytest.raises(UsageError, match="7 steps") as unknown:
        draw(models, PROMPT, steps=7)
    assert "ddim 20 steps" in unknown.value.hint
    with pytest.raises(UsageError, match="heun"):
        draw(models, PROMPT, scheduler="heun")


def test_guidance_that_the_model_cannot_follow_is_refused(models: TextToImage) -> None:
    with pytest.raises(UsageError, match="without guidance"):
        draw(replace(models, guidance_mode="none"), PROMPT, steps=3, guidance=7.5)
    with pytest.raises(UsageError, match="nan"):
        draw(models, PROMPT, steps=3, guidance=float("nan"))


def test_a_model_without_guidance_runs_once_a_step(models: TextToImage) -> None:
    alone = draw(replace(models, guidance_mode="none", default_guidance=1.0), PROMPT, steps=3)
    assert np.array_equal(alone.image, draw(models, PROMPT, steps=3, guidance=1.0).image)


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_an_output_that_is_not_finite_is_an_error_with_its_place(component: str, models: TextToImage) -> None:
    @dataclass
    class Overflowing(ModuleSession):
        def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            outputs = super().run(feeds)
            return {name: value * np.nan for name, value in outputs.items()}

    def opened(name: str) -> ModuleSession:
        honest = models.open(name)
        assert isinstance(honest, ModuleSession)
        return Overflowing(name, honest.pipeline, []) if name == component else honest

    with pytest.raises(ModelError, match=component):
        draw(replace(models, open=opened), PROMPT, steps=3)


def test_a_picture_of_another_size_than_the_bundles_is_an_error(models: TextToImage) -> None:
    with pytest.raises(ModelError, match="64"):
        draw(replace(models, size=(512, 512)), PROMPT, steps=3)


def test_an_embedded_guidance_scale_is_an_input_of_the_unet(models: TextToImage) -> None:
    seen: list[np.ndarray] = []

    @dataclass
    class Distilled(ModuleSession):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.inputs = (*self.inputs, TensorSpec("timestep_cond", "float32", (1, 32)))

        def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            seen.append(feeds["timestep_cond"])
            plain = ModuleSession(self.component, self.pipeline, [])
            return plain.run({name: value for name, value in feeds.items() if name != "timestep_cond"})

    def opened(name: str) -> ModuleSession:
        honest = models.open(name)
        assert isinstance(honest, ModuleSession)
        return Distilled(name, honest.pipeline, []) if name == "unet" else honest

    distilled = replace(models, open=opened, guidance_mode="embedded")
    assert isinstance(draw(distilled, PROMPT, steps=3, guidance=8.0), Drawing)
    expected = StableDiffusionPipeline.get_guidance_scale_embedding(None, torch.tensor([7.0]), 32).numpy()
    assert len(seen) == 3  # one run a step
    np.testing.assert_allclose(seen[0], expected, atol=1e-3)  # sin(7000 * frequency) in float32


def test_a_unet_that_is_fed_otherwise_is_refused(models: TextToImage) -> None:
    def opened(name: str) -> ModuleSession:
        session = models.open(name)
        assert isinstance(session, ModuleSession)
        if name == "unet":
            session.inputs = (TensorSpec("x", "float32", (1, 4, 8, 8)),)
        return session

    with pytest.raises(BundleError, match="sample"):
        draw(replace(models, open=opened), PROMPT, steps=3)
