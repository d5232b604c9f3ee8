"""Whatever options an app leaves on, an ncnn bundle reads the same ids and the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.quantize.plan import Plan
from diffusette.runtimes.ncnn import arithmetic, forms, masks, session, steady_norms
from diffusette.runtimes.ncnn.low_bit import coded_graph
from diffusette.runtimes.ncnn.param import Layer, parse
from diffusette.runtimes.ncnn.products import multiplies_integers
from diffusette.runtimes.ncnn.session import NcnnSession
from diffusette.runtimes.ncnn.target import NcnnTarget
from diffusette.stages.errors import ExportError, UsageError

from .workshop import SIZE, Array, Workshop, rounded_output, snr_db

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated

SCHEMES = [*NcnnTarget.precisions, "w4g32r8_afp"]


def output_in(model: Any, feeds: Mapping[str, Array], name: str) -> Array:
    with NcnnSession(model, 2, name) as opened:
        (output,) = opened.run(feeds).values()
    return output


# --- ids and codes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_encoders(kind_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    checkpoint = open_checkpoint(kind_folder("sdxl"), survey=False)
    return Workshop(tmp_path_factory.mktemp("sdxl"), checkpoint.components)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ids_reach_an_embed_before_anything_that_may_round_them(
    scheme: str, workshop: Workshop, two_encoders: Workshop
) -> None:
    for shop, component in (
        (workshop, "text_encoder"),
        (two_encoders, "text_encoder"),
        (two_encoders, "text_encoder_2"),
    ):
        traced = shop.traced(component)
        layers, contents = parse(traced.param.read_text()), traced.blobs()
        if not Plan(scheme).is_float:
            layers, contents = coded_graph(layers, contents, Plan(scheme).scheme)
        masks.check_exact(layers, ["input_ids"])
        assert any(layer.type == "Embed" for layer in layers)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_made_of_codes_in_float32(scheme: str, workshop: Workshop) -> None:
    traced = workshop.traced("unet")
    layers, _ = coded_graph(parse(traced.param.read_text()), traced.blobs(), Plan(scheme).scheme)
    masks.check_exact(layers, [])
    makers = {blob: layer for layer in layers for blob in layer.outputs}
    for layer in layers:
        if layer.type == "Cast":
            assert masks.is_exact(layer)
            assert masks.is_exact(makers[layer.inputs[0]])


@pytest.mark.parametrize("mask", [0, 1, 2, 4, 16, 7])
def test_a_split_of_ids_that_an_option_may_round_is_refused(mask: int) -> None:
    layers = (
        Layer("Input", "ids", (), ("ids",), {}),
        Layer("Split", "both", ("ids",), ("a", "b"), {masks.KEY: str(mask)}),
    )
    with pytest.raises(ExportError, match="Split both may round the integers ids"):
        masks.check_exact(layers, ["ids"])
    exact = dataclasses.replace(layers[1], params={masks.KEY: str(masks.EXACT)})
    masks.check_exact((layers[0], exact), ["ids"])


def test_an_exact_layer_behind_one_that_may_store_16_bits_is_refused() -> None:
    layers = (
        Layer("Input", "x", (), ("x",), {}),
        Layer("Swish", "swish", ("x",), ("y",), {}),
        Layer("UnaryOp", "square", ("y",), ("z",), {0: "4", masks.KEY: str(masks.EXACT)}),
    )
    with pytest.raises(ExportError, match="UnaryOp square would read y as float32"):
        masks.check_exact(layers, [])
    between = Layer(masks.AS_FLOAT32, "f", ("y",), ("f",), {})
    masks.check_exact((*layers[:2], between, dataclasses.replace(layers[2], inputs=("f",))), [])


@pytest.mark.parametrize("scheme", ["w8c_afp", "w4g64_afp"])
def test_16_bits_cost_a_quantized_text_encoder_what_they_cost_any(scheme: str, workshop: Workshop) -> None:
    feeds = workshop.feeds("text_encoder")
    native = workshop.native("text_encoder", feeds)
    found = {}
    for precision in ("fp16", scheme):
        model = workshop.model("text_encoder", precision)
        found[precision] = snr_db(output_in(model, native, "float32"), output_in(model, native, "bf16"))
    assert found[scheme] > 40  # -1 when ids were rounded
    assert found[scheme] > found["fp16"] - 3


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
def test_norms_taken_apart_hold_where_16_bits_are_stored(
    component: str, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steady_norms, "LONGEST_CHAIN", 2000)
    fresh = Workshop(tmp_path, workshop.sources)  # the limit is no part of a stage's key
    model, feeds = fresh.model(component, "fp16"), fresh.feeds(component)
    output = output_in(model, fresh.native(component, feeds), "bf16")
    assert snr_db(rounded_output(fresh, component, Plan("fp16"), feeds, SIZE), output) > 35


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_products_of_integers_stay_on_the_cpu(component: str, workshop: Workshop) -> None:
    traced = workshop.traced(component)
    layers, _ = coded_graph(parse(traced.param.read_text()), traced.blobs(), Plan("w8c_a8").scheme)
    rounding = [layer for layer in layers if multiplies_integers(layer)]
    assert rounding
    assert all(layer.number(masks.KEY) & masks.NO_VULKAN for layer in rounding)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def other_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ncnn whose defaults are others, as on another processor or in another build."""
    import ncnn

    made = ncnn.Net

    def altered() -> Any:
        net = made()
        for option in ("use_bf16_packed", "use_bf16_storage"):
            setattr(net.opt, option, True)
        for option in ("use_int8_inference", "use_sgemm_convolution", "use_packing_layout"):
            setattr(net.opt, option, False)
        return net

    monkeypatch.setattr(ncnn, "Net", altered)


@pytest.mark.parametrize("check", [forms.check_forms, forms.check_products])
def test_self_tests_find_the_same_under_any_defaults(check: Any, other_defaults: None) -> None:
    check.__wrapped__()


def test_self_tests_would_not_hold_under_those_defaults(other_defaults: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "SELF_TESTS", {})
    with pytest.raises(Exception, match="multiplies integers otherwise"):
        forms.check_products.__wrapped__()


def test_an_unknown_arithmetic_is_refused_with_the_list(workshop: Workshop) -> None:
    with pytest.raises(UsageError, match=r"fp8.*"):
        session.open_net(workshop.model("vae_encoder", "fp16"), 1, "fp8")
    names = [each.name for each in arithmetic.ARITHMETICS]
    assert len(set(names)) == len(names)
