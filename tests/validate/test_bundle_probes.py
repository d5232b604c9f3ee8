"""Probes that a bundle answers itself: by PyTorch's names whatever the runtime takes, for the picked steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from diffusette.checkpoints.checkpoint import DEMO_FOLDER
from diffusette.export.compiled_schedule import CompiledSchedule, ScheduleRow
from diffusette.runtimes.inputs import native_feeds, pytorch_inputs
from diffusette.runtimes.protocol import Array, Closing, Feeds
from diffusette.runtimes.txt2img.generate import TextToImage
from diffusette.runtimes.txt2img.tokenizer import PromptTokenizer
from diffusette.stages.artifacts import TensorSpec
from diffusette.validate.bundle_probes import ask_bundle
from diffusette.validate.reference.probes import ProbePlan

LATENTS, STATES = (1, 4, 2, 2), (1, 77, 3)
PLAN = ProbePlan(("a star", "a heart"), steps=4, picked=((0, "conditional"), (3, "conditional")))


class Numbers(Closing):
    """Models of a runtime that takes a ready-made timestep embedding and 32-bit ids."""

    INPUTS: ClassVar = {
        "text_encoder": (TensorSpec("input_ids", "int32", (1, 77)),),
        "unet": (
            TensorSpec("sample", "float32", LATENTS),
            TensorSpec("timestep_embedding", "float32", (1, 4)),
            TensorSpec("encoder_hidden_states", "float32", STATES),
        ),
        "vae_decoder": (TensorSpec("latent_sample", "float32", LATENTS),),
        "vae_encoder": (TensorSpec("sample", "float32", (1, 3, 16, 16)),),
    }
    OUTPUTS: ClassVar = {
        "text_encoder": TensorSpec("last_hidden_state", "float32", STATES),
        "unet": TensorSpec("out_sample", "float32", LATENTS),
        "vae_decoder": TensorSpec("sample", "float32", (1, 3, 16, 16)),
        "vae_encoder": TensorSpec("latent_parameters", "float32", (1, 8, 2, 2)),
    }

    def __init__(self, component: str) -> None:
        self.inputs = self.INPUTS[component]
        self.outputs = (self.OUTPUTS[component],)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        assert {n: (a.dtype.name, a.shape) for n, a in feeds.items()} == {
            s.name: (s.dtype, s.shape) for s in self.inputs
        }
        total = sum(float(np.abs(a).mean()) for a in feeds.values())
        spec = self.outputs[0]
        return {spec.name: np.full(spec.shape, np.sin(total), np.float32)}

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture
def painter() -> TextToImage:
    rows = tuple(ScheduleRow(900.0 - 200 * i, 1.0, 0.9, (0.1,), 0.0, 0.5, 0.5) for i in range(4))
    return TextToImage(
        tokenizer=PromptTokenizer(DEMO_FOLDER / "tokenizer", 77, 680),
        open=Numbers,
        schedules=(CompiledSchedule("ddim", "AScheduler", 4, 0.0, 1.0, "epsilon", "leading", rows),),
        guidance_mode="cfg",
        default_guidance=4.0,
        scaling_factor=1.0,
        shift=0.0,
        size=(16, 16),
        denoiser="unet",
        time_embedding={"dim": 4, "flip_sin_to_cos": True, "freq_shift": 0.0, "max_period": 10000.0},
    )


def test_calls_are_kept_by_pytorchs_names_with_what_was_answered(painter: TextToImage, tmp_path: Path) -> None:
    probes = ask_bundle(painter, PLAN, tmp_path, guidance=4.0, encoder=True)
    assert {name: len(labels) for name, labels in probes.labels.items()} == {
        "text_encoder": 4,  # the empty prompt and its own, for each
        "unet": 8,  # two prompts, two picked steps, two branches
        "vae_decoder": 2,
        "vae_encoder": 2,
    }
    unet = list(probes.read("unet"))
    assert set(unet[0].feeds) == {"sample", "timestep", "encoder_hidden_states"}
    assert [float(probe.feeds["timestep"]) for probe in unet] == [900.0, 900.0, 300.0, 300.0] * 2
    assert not np.array_equal(unet[0].feeds["encoder_hidden_states"], unet[1].feeds["encoder_hidden_states"])
    first, second = probes.pictures()
    assert (first.prompt, second.prompt, second.seed) == ("a star", "a heart", 1)
    assert first.trajectory.shape == (4, *LATENTS)
    assert first.image.shape == (16, 16, 3)


def test_a_model_without_guidance_is_asked_once_a_step(painter: TextToImage, tmp_path: Path) -> None:
    distilled = replace(painter, guidance_mode="none", default_guidance=0.0)
    probes = ask_bundle(distilled, PLAN, tmp_path, guidance=0.0, encoder=False)
    assert [float(probe.feeds["timestep"]) for probe in probes.read("unet")] == [900.0, 300.0] * 2
    assert "vae_encoder" not in probes.labels


def test_what_the_host_computes_is_known_by_what_it_is_computed_from() -> None:
    native = (
        TensorSpec("sample", "float32", LATENTS),
        TensorSpec("timestep_embedding", "float32", (1, 4)),
        TensorSpec("time_ids_embedding", "float32", (1, 48)),
        TensorSpec("input_ids", "int32", (1, 77)),
        TensorSpec("end_of_text", "float32", (1, 77)),
    )
    asked = pytorch_inputs(native)
    assert [spec.name for spec in asked] == ["sample", "timestep", "time_ids", "input_ids"]
    facts = {"dim": 4, "flip_sin_to_cos": True, "freq_shift": 0.0, "max_period": 10000.0}
    feeds = native_feeds({spec.name: np.ones(spec.shape, spec.dtype) for spec in asked}, native, facts)
    assert {name: value.shape for name, value in feeds.items()} == {spec.name: spec.shape for spec in native}
