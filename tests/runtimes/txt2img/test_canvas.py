"""Image-to-image and inpainting draw what diffusers' pipelines draw, noise included.

The sessions are PyTorch modules of tiny checkpoints, so that whatever differs is this package's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.families import reference_pipeline
from diffusette.export.scheduler import default_scheduler
from diffusette.runtimes.txt2img.canvas import Canvas, first_row, read_canvas
from diffusette.runtimes.txt2img.generate import draw
from diffusette.stages.errors import UsageError
from diffusette.validate.parity import compare
from PIL import Image

from ...kinds import kind_pipeline
from .painter import models_of

PROMPT: Final = "a red star above a blue circle"
SIZE: Final = (64, 64)
SEED: Final = 3
# Guidance in one batch of two reorders sums, and numpy's exp of the posterior's deviation is not torch's.
FLOOR_DB: Final = 100.0


def picture_file(folder: Path) -> Path:
    rows, columns = np.mgrid[0:64, 0:64]
    pixels = np.stack([rows * 4, columns * 4, np.full_like(rows, 90)], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder / "picture.png"


def mask_file(folder: Path) -> Path:
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 8:40] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "mask.png"


def drawn_by_diffusers(kind: str, pipeline: str, scheduler: str, steps: int, **how: Any) -> Any:
    import diffusers
    import torch

    loaded = kind_pipeline(kind, pipeline)
    classes = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "pndm": "PNDMScheduler"}
    if scheduler in classes:
        changed = getattr(diffusers, classes[scheduler]).from_config(loaded.scheduler.config)
        loaded = type(loaded)(**{**loaded.components, "scheduler": changed})
        loaded.set_progress_bar_config(disable=True)
    return loaded(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="latent",
        **how,
    ).images.numpy()


@pytest.mark.parametrize(
    ("kind", "pipeline", "scheduler", "strength"),
    [
        ("sd1", "StableDiffusionImg2ImgPipeline", "ddim", 0.6),
        ("sd2", "StableDiffusionImg2ImgPipeline", "ddim", 1.0),
        ("sdxl", "StableDiffusionXLImg2ImgPipeline", "euler", 0.5),
    ],
)
def test_image_to_image_is_diffusers(
    kind: str, pipeline: str, scheduler: str, strength: float, kind_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    file = picture_file(tmp_path)
    models = models_of(kind_folder(kind), scheduler, 6, pipeline, tmp_path)
    canvas = read_canvas(file, None, strength, SIZE)
    ours = draw(models, PROMPT, guidance=5.0, seed=SEED, canvas=canvas)
    theirs = drawn_by_diffusers(kind, pipeline, scheduler, 6, image=Image.open(file), strength=strength)
    assert compare(theirs, ours.latents).snr_db >= FLOOR_DB


@pytest.mark.parametrize(
    ("kind", "scheduler", "strength"),
    [("sd1-inpainting", "pndm", 1.0), ("sd2-inpainting", "ddim", 1.0), ("sd2-inpainting", "ddim", 0.7)],
)
def test_inpainting_is_diffusers(
    kind: str, scheduler: str, strength: float, kind_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    image, mask = picture_file(tmp_path), mask_file(tmp_path)
    pipeline = reference_pipeline(open_checkpoint(kind_folder(kind), survey=False))
    assert pipeline == "StableDiffusionInpaintPipeline"
    assert default_scheduler(open_checkpoint(kind_folder(kind), survey=False).scheduler) == scheduler
    models = models_of(kind_folder(kind), scheduler, 6, pipeline, tmp_path)
    ours = draw(models, PROMPT, guidance=5.0, seed=SEED, canvas=read_canvas(image, mask, strength, SIZE))
    theirs = drawn_by_diffusers(
        kind,
        pipeline,
        scheduler,
        6,
        image=Image.open(image),
        mask_image=Image.open(mask),
        strength=strength,
        height=64,
        width=64,
    )
    assert compare(theirs, ours.latents).snr_db >= FLOOR_DB


def test_a_picture_of_another_size_is_brought_to_the_bundles(tmp_path: Path) -> None:
    Image.new("RGB", (100, 30), (255, 0, 0)).save(tmp_path / "wide.png")
    canvas = read_canvas(tmp_path / "wide.png", None, None, SIZE)
    assert canvas.image.shape == (1, 3, 64, 64)
    np.testing.assert_allclose(canvas.image[0, :, 5, 5], [1, -1, -1], atol=1e-6)
    assert canvas.strength == 0.8


def test_what_cannot_be_drawn_from_is_refused_by_name(kind_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UsageError, match="cannot be read as a picture"):
        read_canvas(tmp_path / "text.png", None, None, SIZE)
    image = np.zeros((1, 3, 64, 64), np.float32)
    mask = np.ones((1, 1, 64, 64), np.float32)
    with pytest.raises(UsageError, match=r"strength 1\.5"):
        Canvas(image, strength=1.5)
    inpaints = models_of(kind_folder("sd1-inpainting"), "pndm", 4, "StableDiffusionInpaintPipeline", tmp_path)
    with pytest.raises(UsageError, match="needs a picture and a mask"):
        draw(inpaints, PROMPT)
    with pytest.raises(UsageError, match="looks back at earlier steps"):
        first_row(inpaints.schedules[0], 0.5)
    with pytest.raises(UsageError, match="leaves none of 4 steps"):
        first_row(inpaints.schedules[0], 0.1)
    (tmp_path / "base").mkdir()
    base = models_of(kind_folder("sd1"), "ddim", 4, "StableDiffusionPipeline", tmp_path / "base")
    with pytest.raises(UsageError, match="takes no mask"):
        draw(base, PROMPT, canvas=Canvas(image, mask))
    with pytest.raises(UsageError, match="this bundle draws"):
        draw(base, PROMPT, canvas=Canvas(image[..., :32]))
