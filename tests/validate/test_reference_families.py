"""What the reference draws is what diffusers' own pipeline of each kind of checkpoint draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.stages.artifacts import Companions
from diffusette.stages.errors import CheckpointError
from diffusette.validate.parity import compare
from diffusette.validate.reference.probes import ProbePlan, Probes, probe_canvas
from diffusette.validate.reference.pytorch import ReferenceProbes

from ..kinds import kind_pipeline, tiny_decoder
from ..models import edit_json

PROMPT: Final = "a red star above a blue circle"
SEED: Final = 5
# diffusers runs both branches of guidance as one batch of two, which reorders sums. A wrong detail leaves below 60.
FLOOR_DB: Final = 100.0

# kind, guidance mode, scale, steps
CASES: Final = (
    ("sd1", "cfg", 7.5, 4),
    ("sd2", "cfg", 7.5, 4),
    ("sd2-base", "cfg", 7.5, 4),
    ("sdxl", "cfg", 5.0, 4),
    ("segmind", "cfg", 5.0, 4),
    ("bk-sdm-tiny", "cfg", 7.5, 4),
    ("lcm", "embedded", 8.5, 4),
    ("sdxl-lcm", "embedded", 8.0, 4),
    ("sd-turbo", "none", 1.0, 2),
    ("sdxl-turbo", "none", 1.0, 2),
    ("sdxl-dmd2", "none", 1.0, 4),
)


def drawn_by_diffusers(kind: str, guidance: float, steps: int, **more: Any) -> Any:
    import torch

    return kind_pipeline(kind)(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=64,
        width=64,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="latent",
        **more,
    ).images.numpy()


def probed(folder: Path, plan: ProbePlan, into: Path) -> Probes:
    into.mkdir(exist_ok=True)
    return ReferenceProbes(open_checkpoint(folder), (64, 64), plan).run(into)


@pytest.mark.parametrize(("kind", "mode", "guidance", "steps"), CASES)
def test_the_trajectory_is_that_of_diffusers_own_pipeline(
    kind: str, mode: Any, guidance: float, steps: int, kind_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = ProbePlan((PROMPT,), steps=steps, guidance=guidance, guidance_mode=mode, seed=SEED)
    (picture,) = probed(kind_folder(kind), plan, tmp_path).pictures()
    expected = drawn_by_diffusers(kind, guidance, steps)
    assert compare(expected, picture.latents).snr_db >= FLOOR_DB


def test_an_empty_negative_prompt_is_zeros_unless_sdxl_says_otherwise(
    kind_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = ProbePlan((PROMPT,), steps=1, picked=((0, "unconditional"),), seed=SEED)
    (call,) = probed(kind_folder("sdxl"), plan, tmp_path).read("unet")
    assert not call.feeds["encoder_hidden_states"].any()
    assert not call.feeds["text_embeds"].any()
    np.testing.assert_array_equal(call.feeds["time_ids"], [[64, 64, 0, 0, 64, 64]])


def test_a_tiny_decoder_draws_what_diffusers_draws_with_it(kind_folder: Callable[[str], Path], tmp_path: Path) -> None:
    import torch

    tiny_decoder().save_pretrained(tmp_path / "taesd")
    checkpoint = open_checkpoint(kind_folder("sd1"), companions=Companions(vae_decoder=tmp_path / "taesd"))
    (tmp_path / "probes").mkdir()
    plan = ProbePlan((PROMPT,), steps=2, guidance=7.5, seed=SEED)
    (picture,) = ReferenceProbes(checkpoint, (64, 64), plan).run(tmp_path / "probes").pictures()
    pipeline = kind_pipeline("sd1")
    pipeline.register_modules(vae=tiny_decoder())
    generator = torch.Generator("cpu").manual_seed(SEED)
    expected = pipeline(
        PROMPT, num_inference_steps=2, guidance_scale=7.5, height=64, width=64, generator=generator, output_type="np"
    ).images[0]
    assert compare(expected, picture.image, peak=1.0).psnr_db >= FLOOR_DB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "is 'AutoencoderKL', not"),
        ({"latent_channels": 16}, "latents of 16 channels"),
    ],
)
def test_another_decoder_is_refused(
    change: dict[str, Any], message: str, kind_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    tiny_decoder().save_pretrained(tmp_path / "taesd")
    edit_json(tmp_path / "taesd" / "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(kind_folder("sd1"), companions=Companions(vae_decoder=tmp_path / "taesd"), survey=False)


def test_an_inpainting_model_is_asked_to_fill_a_hole_as_diffusers_asks(
    kind_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    import torch

    plan = ProbePlan((PROMPT,), steps=4, guidance=7.5, seed=SEED)
    (picture,) = probed(kind_folder("sd2-inpainting"), plan, tmp_path).pictures()
    canvas = probe_canvas((64, 64))
    image, mask = torch.from_numpy(canvas.image), torch.from_numpy(canvas.mask)
    expected = kind_pipeline("sd2-inpainting")(
        PROMPT,
        image=image,
        mask_image=mask,
        num_inference_steps=4,
        guidance_scale=7.5,
        height=64,
        width=64,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="latent",
    ).images.numpy()
    assert compare(expected, picture.latents).snr_db >= FLOOR_DB
