"""The reference is diffusers' own pipeline, taken apart; probes come from a real trajectory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from diffusette.export.checkpoint import DEMO_FOLDER, open_checkpoint
from diffusette.pipeline.artifacts import Checkpoint
from diffusette.pipeline.errors import ModelError, UsageError
from diffusette.validate.parity import compare
from diffusette.validate.probes import ProbePlan, Probes, plan_for
from diffusette.validate.prompts import too_long
from diffusette.validate.reference import (
    ReferenceProbes,
    RoundedReference,
    TorchModel,
    TorchSession,
    open_reference,
    round_weights,
)

SIZE = (64, 64)
CAPTION = "a large red circle on the left, on a blue background"
PLAN = ProbePlan(
    (CAPTION,), texts=(too_long(CAPTION),), steps=4, picked=((0, "conditional"), (2, "unconditional")), seed=7
)


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return open_checkpoint("demo")


@pytest.fixture(scope="module")
def probes(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Probes:
    return ReferenceProbes(demo, SIZE, PLAN).run(tmp_path_factory.mktemp("probes"))


def test_the_picture_is_the_one_that_diffusers_draws(probes: Probes) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_FOLDER, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    kept: dict[str, torch.Tensor] = {}

    def keep(_: object, step: int, timestep: int, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept.update(values)
        return values

    image = pipeline(
        CAPTION,
        num_inference_steps=PLAN.steps,
        guidance_scale=PLAN.guidance,
        height=SIZE[0],
        width=SIZE[1],
        generator=torch.Generator("cpu").manual_seed(PLAN.seed),
        output_type="np",
        callback_on_step_end=keep,
    ).images[0]
    (picture,) = probes.pictures()
    # diffusers runs both branches of guidance as one batch of two, which only reorders sums
    assert compare(kept["latents"].numpy(), picture.latents).snr_db > 90
    assert compare(image, picture.image, peak=1.0).psnr_db > 90
    assert picture.image.shape == (64, 64, 3)
    assert picture.image.std() > 0.05


def test_probes_cover_every_component_and_the_picked_calls(probes: Probes) -> None:
    assert {name: len(labels) for name, labels in probes.labels.items()} == {
        "text_encoder": 3,  # empty, the caption, one that is cut at 77 tokens
        "unet": 2,
        "vae_decoder": 1,
        "vae_encoder": 1,
    }
    early, late = probes.read("unet")
    assert early.feeds["timestep"] > late.feeds["timestep"] > 0
    assert "conditional" in early.label
    assert "unconditional" in late.label
    assert not np.array_equal(early.feeds["encoder_hidden_states"], late.feeds["encoder_hidden_states"])


def test_feeds_and_outputs_have_the_canonical_shapes(probes: Probes, demo: Checkpoint) -> None:
    for component, source in demo.components.items():
        with TorchSession(TorchModel(source, SIZE)) as session:
            for probe in probes.read(component):
                assert {s.name: (s.dtype, s.shape) for s in session.inputs} == {
                    name: (array.dtype.name, array.shape) for name, array in probe.feeds.items()
                }
                assert {s.name: s.shape for s in session.outputs} == {n: a.shape for n, a in probe.outputs.items()}


def test_the_reference_agrees_with_its_own_probes(probes: Probes, demo: Checkpoint) -> None:
    argument = TorchModel(demo.components["unet"], SIZE)
    with open_reference(argument, threads=min(2, os.cpu_count() or 1)) as session:
        for probe in probes.read("unet"):
            assert compare(probe.outputs["out_sample"], session.run(probe.feeds)["out_sample"]).snr_db > 110


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_rounding_costs_something_but_not_the_model(
    component: str, probes: Probes, demo: Checkpoint, tmp_path: Path
) -> None:
    rounded = RoundedReference(probes, demo.components[component], "fp16").run(tmp_path)
    assert rounded.count == len(probes.labels[component])
    for probe, answers in zip(probes.read(component), rounded.read(), strict=True):
        for name, expected in probe.outputs.items():
            assert 50 < compare(expected, answers[name]).snr_db < 100


def test_only_weights_of_two_or_more_dimensions_are_rounded() -> None:
    import torch

    layer = torch.nn.Linear(3, 3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    round_weights(layer, "fp16")
    assert torch.equal(layer.weight, weight.half().float())
    assert not torch.equal(layer.weight, weight)
    assert torch.equal(layer.bias, bias)


def test_a_weight_beyond_float16_is_refused() -> None:
    import torch

    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = 70000.0
    with pytest.raises(ModelError, match="weight weight does not fit float16"):
        round_weights(layer, "fp16")


def test_an_unknown_rounding_is_refused() -> None:
    import torch

    with pytest.raises(UsageError, match="'fp61'"):
        round_weights(torch.nn.Linear(2, 2), "fp61")


def test_the_key_follows_the_plan_and_the_checkpoint(demo: Checkpoint, probes: Probes) -> None:
    keys = [
        ReferenceProbes(demo, SIZE, PLAN).key(),
        ReferenceProbes(demo, (128, 64), PLAN).key(),
        ReferenceProbes(demo, SIZE, ProbePlan((CAPTION,))).key(),
    ]
    assert keys[0] == ReferenceProbes(demo, SIZE, PLAN).key()
    assert all(keys[0] != other for other in keys[1:])


def test_a_large_model_gets_a_frugal_plan(demo: Checkpoint) -> None:
    small, large = plan_for(demo, SIZE), plan_for(demo, (2048, 2048))
    calls = [plan.steps * len(plan.prompts) for plan in (small, large)]
    assert calls == [80, 4]
    assert len(small.picked) == 8
    assert len(large.picked) == 3
    assert {branch for _, branch in large.picked} == {"conditional", "unconditional"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompts": ()},
        {"guidance": 1.0},
        {"steps": 4, "picked": ((4, "conditional"),)},
        {"picked": ((-1, "conditional"),)},
    ],
)
def test_a_plan_that_would_probe_less_than_it_says_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"proves nothing|makes no unconditional|not among"):
        ProbePlan(**{"prompts": (CAPTION,), **wrong})
