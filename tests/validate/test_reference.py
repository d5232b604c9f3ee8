"""The reference is diffusers' own pipeline, taken apart; probes come from a real trajectory."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusette.checkpoints.checkpoint import DEMO_FOLDER, open_checkpoint
from diffusette.checkpoints.safetensors_file import read_header
from diffusette.export import modules
from diffusette.quantize.plan import Plan
from diffusette.quantize.quantized import QuantizeWeights
from diffusette.quantize.stored_weights import StoredWeights
from diffusette.stages.artifacts import Checkpoint
from diffusette.stages.errors import ModelError
from diffusette.validate.parity import compare
from diffusette.validate.reference.probes import ProbePlan, Probes, plan_for
from diffusette.validate.reference.prompts import too_long
from diffusette.validate.reference.pytorch import ReferenceProbes, RoundedReference
from diffusette.validate.reference.torch_session import (
    TorchModel,
    TorchSession,
    open_reference,
    round_weights,
    settle_threads,
)

from ..models import edit_tensors, poison

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


def test_it_does_not_depend_on_how_many_threads_pytorch_was_given(
    demo: Checkpoint, probes: Probes, tmp_path: Path
) -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = ReferenceProbes(demo, SIZE, PLAN).run(tmp_path)
    finally:
        torch.set_num_threads(before)
    for component in probes.labels:
        for one, other in zip(probes.read(component), alone.read(component), strict=True):
            assert all(np.array_equal(one.outputs[name], other.outputs[name]) for name in one.outputs), one.label


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
    rounded = RoundedReference(probes, demo.components[component], Plan("fp16"), None).run(tmp_path)
    assert rounded.count == len(probes.labels[component])
    for probe, answers in zip(probes.read(component), rounded.read(), strict=True):
        for name, expected in probe.outputs.items():
            assert 50 < compare(expected, answers[name]).snr_db < 100


def test_weights_that_are_float16_already_are_not_asked_about_twice(
    demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "half"))
    edit_tensors(
        folder / "vae" / "diffusion_pytorch_model.safetensors",
        lambda t: {n: a.astype(np.float16) for n, a in t.items()},
    )
    half = open_checkpoint(folder).components["vae_decoder"]
    (tmp_path / "probes").mkdir()
    feeds = {"latent_sample": np.ones((1, 4, 8, 8), np.float32)}
    settle_threads()
    with TorchSession(TorchModel(half, SIZE)) as session:
        answer = session.run(feeds)
    arrays = {"feed.latent_sample": feeds["latent_sample"], "output.sample": answer["sample"]}
    np.savez(tmp_path / "probes" / "vae_decoder-000.npz", allow_pickle=False, **arrays)
    probes = Probes(tmp_path / "probes", PLAN, SIZE, {"vae_decoder": ("ones",)})

    def rounded(name: str) -> np.ndarray[Any, Any]:
        (tmp_path / name).mkdir()
        (answers,) = RoundedReference(probes, half, Plan("fp16"), None).run(tmp_path / name).read()
        return answers["sample"]

    with monkeypatch.context() as patch:
        patch.setattr(StoredWeights, "is_rounded", lambda self, name: True)
        np.testing.assert_array_equal(rounded("asked"), answer["sample"])
    monkeypatch.setattr(TorchSession, "__init__", None)  # nothing can be asked
    np.testing.assert_array_equal(rounded("known"), answer["sample"])


@pytest.mark.parametrize("scheme", ["fp16", "w8c_afp", "w4g64_afp"])
def test_the_module_computes_with_the_values_that_are_stored_and_keeps_biases(
    scheme: str, demo: Checkpoint, tmp_path: Path
) -> None:
    import torch

    source, plan = demo.components["text_encoder"], Plan(scheme)
    stored = StoredWeights(source, plan, None if plan.is_float else QuantizeWeights(source, plan).run(tmp_path))
    module = modules.load(source)
    before = {name: value.clone() for name, value in module.named_parameters()}
    round_weights(module, stored)
    for name, value in module.named_parameters():
        bare = name.removeprefix("m.")
        assert torch.equal(value, torch.from_numpy(stored.read(bare)))
        assert torch.equal(value, before[name]) == (stored.scheme(bare).name == "fp32")
    assert stored.scheme("encoder.layers.0.mlp.fc1.weight").name == scheme


def test_a_weight_beyond_float16_is_refused(demo: Checkpoint, tmp_path: Path) -> None:
    source = demo.components["text_encoder"]
    copy = tmp_path / "model.safetensors"
    shutil.copy(source.files[0], copy)
    stored = next(name for name in read_header(copy) if name.endswith("layers.1.mlp.fc1.weight"))
    poison(copy, stored, 3, 70000.0)
    large = replace(source, files=(copy,), digest="large")
    with pytest.raises(ModelError, match=r"text_encoder/encoder.layers.1.mlp.fc1.weight holds 7e\+04"):
        round_weights(modules.load(large), StoredWeights(large, Plan("fp16"), None))


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
