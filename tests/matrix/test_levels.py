"""A VAE of three levels has 4 pixels a latent: the checkpoint is converted, and draws, at its true size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL, ControlNetModel
from diffusette.bundle.draw import draw_with_bundle
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.convert.convert import convert_checkpoint
from diffusette.export.contract import input_specs
from diffusette.runtimes.txt2img.canvas import Canvas
from diffusette.stages.artifacts import Companions
from diffusette.stages.cache import Cache
from diffusette.stages.errors import CheckpointError
from diffusette.stages.progress import Silent
from diffusette.validate.check import check_bundle
from diffusette.validate.reference.probes import probe_canvas

from ..kinds import kind_pipeline, tiny_controlnet, tiny_decoder
from .cells import lean_recipe, one_process, runtimes

pytestmark = pytest.mark.matrix

SIZE = (32, 64)  # 8 x 16 latents


def three_levels() -> Any:
    import torch

    torch.manual_seed(8)
    made: Any = AutoencoderKL
    return made(
        sample_size=32,
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


@pytest.fixture(scope="module", params=["sd1", "sd1-inpainting"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("levels") / request.param
    pipeline = kind_pipeline(request.param)
    pipeline.vae = three_levels()
    pipeline.save_pretrained(place)
    return place


def test_the_unet_is_told_how_large_latents_are(folder: Path) -> None:
    found = open_checkpoint(folder, survey=False)
    assert found.vae_scale == 4
    assert input_specs(found.components["unet"], SIZE)[0].shape[2:] == (8, 16)
    assert input_specs(found.components["vae_decoder"], SIZE)[0].shape[2:] == (8, 16)


def test_it_converts_passes_its_gates_and_draws_at_its_size(folder: Path, tmp_path: Path, cells_cache: Cache) -> None:
    with one_process():
        made = convert_checkpoint(
            folder, tmp_path / "out", recipe=lean_recipe(folder), size=SIZE, targets=runtimes(), cache=cells_cache
        )
        assert made.ok
        for each in made.converted:
            report, _ = check_bundle(each.bundle, threads=1, cache=cells_cache)
            assert report.ok
            assert report.image is not None
            inpaints = each.bundle.manifest.conditioning.input_channels == 9
            canvas: Canvas | None = probe_canvas(SIZE) if inpaints else None
            drawing = draw_with_bundle(each.bundle, "a red star", canvas=canvas, threads=1, progress=Silent())
            assert drawing.image.shape == (*SIZE, 3)


def test_a_companion_for_other_latents_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    tiny_decoder().save_pretrained(tmp_path / "taesd")
    with pytest.raises(CheckpointError, match=r"makes 8 pixels of a latent, the checkpoint's VAE makes 4"):
        open_checkpoint(folder, companions=Companions(vae_decoder=tmp_path / "taesd"), survey=False)
    kind_pipeline("sd1").vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointError, match=r"8 pixels a latent, the checkpoint's own VAE has 4"):
        open_checkpoint(folder, companions=Companions(vae=tmp_path / "vae"), survey=False)
    tiny_controlnet("sd1").save_pretrained(tmp_path / "controlnet")
    with pytest.raises(CheckpointError, match=r"does not bring a picture to the size of latents, one for 4 pixels"):
        open_checkpoint(folder, companions=Companions(controlnet=tmp_path / "controlnet"), survey=False)


def test_a_tiny_decoder_and_a_controlnet_for_these_latents_are_taken(folder: Path, tmp_path: Path) -> None:
    tiny_decoder(levels=3).save_pretrained(tmp_path / "taesd")
    network: Any = ControlNetModel
    network.from_unet(kind_pipeline("sd1").unet, conditioning_embedding_out_channels=(4, 4, 8)).save_pretrained(
        tmp_path / "controlnet"
    )
    given = Companions(vae_decoder=tmp_path / "taesd", controlnet=tmp_path / "controlnet")
    found = open_checkpoint(folder, companions=given, survey=False)
    assert input_specs(found.components["vae_decoder"], SIZE)[0].shape[2:] == (8, 16)
    assert input_specs(found.components["controlnet"], SIZE)[0].shape[2:] == (8, 16)
