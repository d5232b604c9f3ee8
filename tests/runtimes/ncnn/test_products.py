"""Products of integers on ncnn: what is rounded, over which ranges, and what of it is left to float32."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusette.export import modules
from diffusette.quantize.plan import Plan
from diffusette.quantize.quantized import quantized_weights
from diffusette.quantize.ranges import layer_ranges
from diffusette.quantize.samples import Samples
from diffusette.quantize.stored_weights import StoredWeights
from diffusette.runtimes.ncnn import forms, param, session
from diffusette.runtimes.ncnn.codes import input_multiplier
from diffusette.runtimes.ncnn.products import multiplies_integers
from diffusette.runtimes.ncnn.session import NcnnSession
from diffusette.runtimes.ncnn.target import NcnnTarget
from diffusette.runtimes.ncnn.write import WriteNcnn
from diffusette.stages.errors import ExportError, ModelError
from diffusette.validate.reference.torch_session import round_weights

from .workshop import SIZE, Array, Workshop, ncnn_output, rounded_output, snr_db

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated

EIGHT = Plan("w8c_a8")


@pytest.fixture(scope="module")
def ranged(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Plan], Plan]:
    """The plan with ranges of the very feeds that the tests run."""

    def find(component: str, plan: Plan = EIGHT) -> Plan:
        folder = tmp_path_factory.mktemp(component)
        feeds = {f"feed.{name}": array for name, array in workshop.feeds(component).items()}
        np.savez(folder / f"{component}-000.npz", allow_pickle=False, **feeds)
        samples = Samples((folder,), (component,))
        found = layer_ranges(workshop.sources[component], samples, "minmax", workshop.run)
        return dataclasses.replace(plan, ranges=found)

    return find


def emulated(workshop: Workshop, component: str, plan: Plan, feeds: dict[str, Array]) -> Array:
    """PyTorch with the same codes, whose layers round what they are given as ncnn's do."""
    import torch
    from torch import nn

    source = workshop.sources[component]
    module = modules.load(source)
    stored = StoredWeights(source, plan, quantized_weights(source, plan, workshop.run))
    round_weights(module, stored)
    assert plan.ranges
    entering = plan.ranges.read("input")

    def over(peak: Any, x: Any) -> Any:
        step = peak / 127
        return torch.clamp(torch.round(x / step), -127, 127) * step

    def before(path: str, layer: Any) -> Any:
        if isinstance(layer, nn.Conv2d):
            return lambda _, inputs: (over(max(map(abs, entering[path])), inputs[0]),)
        return lambda _, inputs: (over(inputs[0].abs().amax(dim=-1, keepdim=True).clamp(min=1e-30), inputs[0]),)

    bare: Any = module.m
    for path, layer in bare.named_modules():
        if path in entering and stored.scheme(f"{path}.weight").activation_bits == 8:
            layer.register_forward_pre_hook(before(path, layer))
    with torch.inference_mode():
        expected: Array = module(*(torch.from_numpy(array) for array in feeds.values())).numpy()
    return expected


# One kind of layer at a time. A sum that differs in its last bit may round to the next step, and all that follows is
# then rounded otherwise: where a whole UNet or VAE rounds, such ties alone cost as much as the rounding does.
@pytest.mark.parametrize(
    ("component", "kind"),
    [
        ("text_encoder", r"fc1"),
        ("unet", r"to_q"),
        ("unet", r"ff\.net\.2"),
        ("unet", r"time_emb_proj"),  # a vector
        ("unet", r"conv_in|conv_shortcut|conv"),  # the last: strides of two, and after an upsampling
        ("vae_decoder", r"to_out\.0"),
        ("vae_decoder", r"post_quant_conv|conv_out"),
    ],
)
def test_it_rounds_what_enters_a_layer_and_nothing_else(
    component: str, kind: str, workshop: Workshop, ranged: Callable[..., Plan]
) -> None:
    plan, feeds = ranged(component), workshop.feeds(component)
    assert plan.ranges
    paths = plan.ranges.read("input")
    others = tuple((path, "w8c_afp") for path in paths if not re.search(rf"(^|\.)({kind})$", path))
    assert len(others) < len(paths)
    plan = dataclasses.replace(plan, exceptions=others)
    output = ncnn_output(
        NcnnTarget().build(workshop.sources[component], SIZE, plan, workshop.run), workshop.native(component, feeds)
    )
    lost = snr_db(rounded_output(workshop, component, plan, feeds), output)
    assert snr_db(emulated(workshop, component, plan, feeds), output) > max(lost + 20, 70)


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_every_layer_multiplies_integers_and_the_note_says_what_that_takes(
    component: str, workshop: Workshop, ranged: Callable[..., Plan]
) -> None:
    plan, feeds = ranged(component), workshop.feeds(component)
    model = NcnnTarget().build(workshop.sources[component], SIZE, plan, workshop.run)
    written = param.parse((model.folder / model.files[0]).read_text())
    assert plan.ranges
    assert sum(map(multiplies_integers, written)) == len(plan.ranges.read("input"))
    names = [layer.name for layer in written if layer.type != "Split"]  # pnnx names two of them alike
    assert len(set(names)) == len(names)
    assert "use_int8_inference" in model.notes[0]
    output = ncnn_output(model, workshop.native(component, feeds))
    assert snr_db(rounded_output(workshop, component, plan, feeds), output) > 25


def test_schemes_mix_layer_by_layer(workshop: Workshop, ranged: Callable[..., Plan]) -> None:
    others = (("conv_in", "w8c_afp"), ("conv_out", "fp16"), ("mid_block.attentions.0.proj_in", "w4g64_afp"))
    plan, feeds = ranged("unet", Plan("w8c_a8", others)), workshop.feeds("unet")
    model = NcnnTarget().build(workshop.sources["unet"], SIZE, plan, workshop.run)
    output = ncnn_output(model, workshop.native("unet", feeds))
    assert snr_db(rounded_output(workshop, "unet", plan, feeds), output) > 25


def test_weights_take_the_bits_that_the_plan_says(workshop: Workshop, ranged: Callable[..., Plan]) -> None:
    plan, source = ranged("unet"), workshop.sources["unet"]
    model = NcnnTarget().build(source, SIZE, plan, workshop.run)
    shapes = StoredWeights(source, plan, quantized_weights(source, plan, workshop.run)).shapes()
    assert model.bits_per_weight == pytest.approx(plan.bits_per_weight(shapes), rel=0.03)


def test_a_layer_without_a_range_is_refused_by_name(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"post_quant_conv\.weight.*no calibrated range"):
        NcnnTarget().build(workshop.sources["vae_decoder"], SIZE, EIGHT, workshop.run)


def test_other_ranges_are_another_model(workshop: Workshop, ranged: Callable[..., Plan]) -> None:
    source = workshop.sources["vae_decoder"]
    traced, codes = workshop.traced("vae_decoder"), quantized_weights(source, EIGHT, workshop.run)
    keys = [WriteNcnn(traced, source, SIZE, plan, codes).key() for plan in (EIGHT, ranged("vae_decoder"))]
    assert keys[0] != keys[1]


@pytest.mark.parametrize(("limits", "expected"), [((-0.5, 2.0), 63.5), ((-4.0, 2.0), 31.75), ((0.0, 0.0), 1.0)])
def test_the_largest_magnitude_becomes_the_largest_code(limits: tuple[float, float], expected: float) -> None:
    assert input_multiplier(limits) == np.float32(expected)


def test_an_ncnn_that_multiplies_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "unit", lambda codes: np.float32(3))
    forms.check_products.cache_clear()
    try:
        with pytest.raises(ModelError, match="multiplies integers otherwise than it did: g"):
            forms.check_products()
    finally:
        forms.check_products.cache_clear()


def test_it_is_asked_before_such_a_model_is_opened(
    monkeypatch: pytest.MonkeyPatch, workshop: Workshop, ranged: Callable[..., Plan]
) -> None:
    def refuse() -> None:
        raise ModelError("asked")

    model = NcnnTarget().build(workshop.sources["vae_decoder"], SIZE, ranged("vae_decoder"), workshop.run)
    monkeypatch.setattr(session, "check_products", refuse)
    with pytest.raises(ModelError, match="asked"):
        NcnnSession(model, threads=1)
