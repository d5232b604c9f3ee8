"""Drawing along a picture is what diffusers' ControlNet pipelines do, in both branches of guidance.

The sessions are PyTorch modules of tiny checkpoints, so that whatever differs is this package's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from diffusette.runtimes.txt2img.canvas import Canvas
from diffusette.runtimes.txt2img.control import Control, read_control
from diffusette.runtimes.txt2img.generate import TextToImage, draw
from diffusette.stages.artifacts import Companions
from diffusette.stages.errors import UsageError
from diffusette.validate.parity import compare
from diffusette.validate.reference.probes import probe_canvas, probe_control
from PIL import Image

from ...kinds import kind_pipeline, tiny_controlnet
from .painter import SIZE, models_of

PROMPT: Final = "a red star above a blue circle"
SEED: Final = 3
# Guidance in one batch of two reorders sums. A residual that is left out, or not scaled, leaves below 30.
FLOOR_DB: Final = 100.0
EDGES: Final = probe_control(SIZE)
assert EDGES.picture is not None
PICTURE: Final = EDGES.picture


def controlled(kind: str, folder: Path, scheduler: str, steps: int, pipeline: str, scratch: Path) -> TextToImage:
    tiny_controlnet(kind).save_pretrained(scratch / "controlnet")
    given = Companions(controlnet=scratch / "controlnet")
    return models_of(folder, scheduler, steps, pipeline, scratch, given)


def drawn_by_diffusers(kind: str, pipeline: str, steps: int, **how: Any) -> Any:
    more = {} if pipeline == "StableDiffusionPipeline" else {"controlnet": tiny_controlnet(kind)}
    generator = torch.Generator("cpu").manual_seed(SEED)
    loaded = kind_pipeline(kind, pipeline, **more)
    return loaded(
        PROMPT, num_inference_steps=steps, guidance_scale=5.0, generator=generator, output_type="latent", **how
    ).images.numpy()


@pytest.mark.parametrize(
    ("kind", "pipeline", "scheduler"),
    [
        ("sd1", "StableDiffusionControlNetPipeline", "ddim"),
        ("sd2", "StableDiffusionControlNetPipeline", "ddim"),
        ("sdxl", "StableDiffusionXLControlNetPipeline", "euler"),
    ],
)
def test_a_picture_along_edges_is_diffusers(
    kind: str, pipeline: str, scheduler: str, kind_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    models = controlled(kind, kind_folder(kind), scheduler, 3, pipeline, tmp_path)
    drawing = draw(models, PROMPT, seed=SEED, control=Control(EDGES.picture, 0.7))
    edges = torch.from_numpy(EDGES.picture)
    expected = drawn_by_diffusers(kind, pipeline, 3, image=edges, controlnet_conditioning_scale=0.7)
    assert compare(expected, drawing.latents).snr_db >= FLOOR_DB
    assert drawing.control_scale == 0.7
    inverted = draw(models, PROMPT, seed=SEED, control=Control(1 - PICTURE, 0.7))
    assert compare(expected, inverted.latents).snr_db < 30


def test_it_goes_with_a_picture_to_start_from(kind_folder: Callable[[str], Path], tmp_path: Path) -> None:
    pipeline = "StableDiffusionControlNetImg2ImgPipeline"
    models = controlled("sd1", kind_folder("sd1"), "ddim", 5, pipeline, tmp_path)
    canvas = Canvas(probe_canvas(SIZE).image, strength=0.6)
    drawing = draw(models, PROMPT, seed=SEED, canvas=canvas, control=EDGES)
    expected = drawn_by_diffusers(
        "sd1",
        pipeline,
        5,
        image=torch.from_numpy(canvas.image),
        control_image=torch.from_numpy(EDGES.picture),
        controlnet_conditioning_scale=1.0,
        strength=0.6,
    )
    assert compare(expected, drawing.latents).snr_db >= FLOOR_DB


def test_an_inpainting_unet_takes_it_and_the_controlnet_sees_latents_alone(
    kind_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    pipeline = "StableDiffusionControlNetInpaintPipeline"
    models = controlled("sd2-inpainting", kind_folder("sd2-inpainting"), "ddim", 3, pipeline, tmp_path)
    canvas = probe_canvas(SIZE)
    drawing = draw(models, PROMPT, seed=SEED, canvas=canvas, control=EDGES)
    expected = drawn_by_diffusers(
        "sd2-inpainting",
        pipeline,
        3,
        image=torch.from_numpy(canvas.image),
        mask_image=torch.from_numpy(canvas.mask),
        control_image=torch.from_numpy(EDGES.picture),
        controlnet_conditioning_scale=1.0,
        strength=1.0,
        height=64,
        width=64,
    )
    assert compare(expected, drawing.latents).snr_db >= FLOOR_DB


def test_at_scale_zero_no_picture_is_needed_and_the_checkpoint_draws_as_without(
    kind_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    models = controlled("sd1", kind_folder("sd1"), "ddim", 3, "StableDiffusionPipeline", tmp_path)
    drawing = draw(models, PROMPT, seed=SEED, control=read_control(None, 0.0, SIZE))
    expected = drawn_by_diffusers("sd1", "StableDiffusionPipeline", 3, height=64, width=64)
    assert compare(expected, drawing.latents).snr_db >= FLOOR_DB


def test_a_picture_that_nothing_reads_and_a_controlnet_without_one_are_refused(
    kind_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    models = controlled("sd1", kind_folder("sd1"), "ddim", 3, "StableDiffusionPipeline", tmp_path)
    with pytest.raises(UsageError, match="needs a control picture") as refusal:
        draw(models, PROMPT)
    assert "--control FILE" in refusal.value.hint
    with pytest.raises(UsageError, match="the control picture is"):
        draw(models, PROMPT, control=Control(PICTURE[:, :, :32]))
    (tmp_path / "plain").mkdir()
    plain = models_of(kind_folder("sd1"), "ddim", 3, "StableDiffusionPipeline", tmp_path / "plain")
    with pytest.raises(UsageError, match="no ControlNet in this bundle"):
        draw(plain, PROMPT, control=EDGES)


def test_a_file_becomes_numbers_from_0_to_1_at_the_bundles_size(tmp_path: Path) -> None:
    pixels = np.zeros((128, 64, 3), np.uint8)
    pixels[:, 32:] = 255
    Image.fromarray(pixels).save(tmp_path / "edges.png")
    found = read_control(tmp_path / "edges.png", None, SIZE)
    assert found
    assert found.picture is not None
    assert found.scale == 1
    assert (found.picture.shape, found.picture.dtype) == ((1, 3, 64, 64), np.float32)
    assert (found.picture.min(), found.picture.max()) == (0, 1)
    assert read_control(None, None, SIZE) is None


@pytest.mark.parametrize(
    ("file", "scale", "message"),
    [
        (None, 0.5, "without a control picture"),
        (None, float("nan"), "not a finite number"),
        ("absent.png", None, "cannot be read as a picture"),
    ],
)
def test_what_is_no_control_is_refused(file: str | None, scale: float | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read_control(tmp_path / file if file else None, scale, SIZE)
