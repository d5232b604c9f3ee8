"""Weights of few bits on ncnn: the same codes as on every target, in files that this ncnn reads as we wrote them."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusette.checkpoints.families.sd1 import SD1
from diffusette.quantize.codes import Codes, round_to_nearest
from diffusette.quantize.plan import Plan
from diffusette.quantize.quantized import quantized_weights
from diffusette.quantize.scheme import parse_scheme
from diffusette.quantize.stored_weights import StoredWeights
from diffusette.runtimes.ncnn import codes as encoding
from diffusette.runtimes.ncnn import forms, param, slots
from diffusette.runtimes.ncnn.layout import PARAMETER, Blob
from diffusette.runtimes.ncnn.low_bit import coded_graph
from diffusette.runtimes.ncnn.session import NcnnSession
from diffusette.runtimes.ncnn.target import NcnnTarget
from diffusette.stages.artifacts import TargetModel
from diffusette.stages.errors import ExportError, ModelError
from diffusette.validate.reference.torch_session import TorchModel, TorchSession

from .workshop import SIZE, Workshop, ncnn_output, rounded_output, snr_db

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated

LOW_BIT = [scheme for scheme in NcnnTarget.precisions if scheme.endswith("_afp")]
MIXED = Plan("w4g64_afp", (("conv_in", "fp32"), ("conv_out", "fp16"), ("mid_block.attentions.0.proj_in", "w8c_afp")))
BRANCHED = Plan("w4g64r8_afp", (("conv_in", "w8cr4_afp"), ("down_blocks.0.resnets.0.conv1", "w8cr16_afp")))


def build(workshop: Workshop, component: str, plan: Plan) -> TargetModel:
    return NcnnTarget().build(workshop.sources[component], SIZE, plan, workshop.run)


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", tuple(SD1.components))
@pytest.mark.parametrize("scheme", ["w8c_afp", "w4g64_afp"])
def test_it_computes_what_pytorch_computes_with_the_same_codes(scheme: str, component: str, workshop: Workshop) -> None:
    plan, feeds = Plan(scheme), workshop.feeds(component)
    output = ncnn_output(build(workshop, component, plan), workshop.native(component, feeds))
    assert snr_db(rounded_output(workshop, component, plan, feeds), output) >= 100


@pytest.mark.parametrize("plan", [*map(Plan, LOW_BIT[1:]), MIXED, BRANCHED], ids=lambda plan: plan.label)
def test_every_scheme_and_mixtures_run_in_the_unet(plan: Plan, workshop: Workshop) -> None:
    feeds = workshop.feeds("unet")
    output = ncnn_output(build(workshop, "unet", plan), workshop.native("unet", feeds))
    assert snr_db(rounded_output(workshop, "unet", plan, feeds), output) >= 100


def test_other_picture_sizes_are_as_exact(workshop: Workshop) -> None:
    size, plan, source = (128, 96), Plan("w4g64_afp"), workshop.sources["unet"]
    feeds = workshop.feeds("unet", size)
    model = NcnnTarget().build(source, size, plan, workshop.run)
    output = ncnn_output(model, workshop.native("unet", feeds, size))
    with TorchSession(TorchModel(source, size, plan, quantized_weights(source, plan, workshop.run))) as session:
        (expected,) = session.run(feeds).values()
    assert snr_db(expected, output) >= 100


@pytest.mark.parametrize("scheme", [*LOW_BIT, "w4g64r8_afp"])
def test_weights_take_the_bits_that_the_plan_says(scheme: str, workshop: Workshop) -> None:
    plan, source = Plan(scheme), workshop.sources["unet"]
    model = build(workshop, "unet", plan)
    shapes = StoredWeights(source, plan, quantized_weights(source, plan, workshop.run)).shapes()
    assert model.bits_per_weight == pytest.approx(plan.bits_per_weight(shapes), rel=0.03)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def coded(workshop: Workshop, tmp_path: Path) -> TargetModel:
    model = build(workshop, "vae_decoder", Plan("w8c_afp"))
    return dataclasses.replace(model, folder=Path(shutil.copytree(model.folder, tmp_path / "copy")))


def offset_of(model: TargetModel, kind: str) -> int:
    """Where the first slot of a layer type begins in the `.bin`, counted by tags and lengths."""
    data = (model.folder / model.files[1]).read_bytes()
    position = 0
    for slot in slots.slots_of(param.parse((model.folder / model.files[0]).read_text())):
        if slot.type == kind:
            return position
        width = 4
        if slot.tagged:
            tag = data[position : position + 4]
            position += 4 + (1024 if tag == slots.TAG_BOOK else 0)
            width = {slots.TAG_FP32: 4, slots.TAG_FP16: 2}.get(tag, 1)
        position += -(-slot.elements * width // 4) * 4
    raise AssertionError(kind)


def test_a_damaged_scale_is_seen_against_the_same_codes(coded: TargetModel, workshop: Workshop) -> None:
    weights, feeds = coded.folder / coded.files[1], workshop.feeds("vae_decoder")
    expected = rounded_output(workshop, "vae_decoder", Plan("w8c_afp"), feeds)
    data = bytearray(weights.read_bytes())
    place = offset_of(coded, "Scale")
    damaged = np.frombuffer(data, np.float32, 1, place) * np.float32(1.1)  # of one of 64 channels
    data[place : place + 4] = damaged.tobytes()
    weights.write_bytes(data)
    assert snr_db(expected, ncnn_output(coded, feeds)) < 95  # the gate's tolerance


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data, place: data[:-8], id="cut"),
        pytest.param(lambda data, place: data[:place] + b"\x02" + data[place + 1 :], id="tag of nobody"),
        pytest.param(lambda data, place: data[:place] + slots.TAG_FP16 + data[place + 4 :], id="tag of float16"),
        pytest.param(lambda data, place: data[:place] + slots.TAG_INT8 + data[place + 4 :], id="tag of bytes"),
    ],
)
def test_cut_files_and_wrong_tags_are_noticed(damage: Any, coded: TargetModel) -> None:
    weights = coded.folder / coded.files[1]
    data = weights.read_bytes()
    place = offset_of(coded, "Convolution")
    weights.write_bytes(damage(data, place))
    with pytest.raises(ModelError):
        NcnnSession(coded, threads=1)


def test_an_ncnn_that_reads_the_forms_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch, coded: TargetModel) -> None:
    monkeypatch.setattr(forms, "unit", lambda codes: np.float32(3))
    forms.check_forms.cache_clear()
    with pytest.raises(ModelError, match="misreads weights of few bits: book"):
        NcnnSession(coded, threads=1)
    monkeypatch.undo()
    NcnnSession(coded, threads=1).close()


# --- bytes ------------------------------------------------------------------------------------------------------------


def weight(scheme: str, shape: tuple[int, ...]) -> Codes:
    values = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    return round_to_nearest(values, parse_scheme(scheme), "w")


def written(kind: str, codes: Codes, tagged: bool = True) -> bytes:
    stream = io.BytesIO()
    slot = slots.Slot("layer", "MemoryData", "data", tagged, codes.values.size)
    encoding.encode(stream, Blob(slot, kind, "w", codes.values.shape), codes)
    assert len(stream.getvalue()) % 4 == 0
    return stream.getvalue()


def test_nibbles_come_back() -> None:
    codes = weight("w4g32_afp", (5, 66))
    packed = np.frombuffer(written(encoding.NIBBLES, codes)[4 : 4 + 5 * 33], np.int8).reshape(5, 33).astype(np.float32)
    high = np.floor(packed / 16)
    low = packed - 16 * high - 8
    assert np.array_equal(np.concatenate([high, low], axis=1), codes.values)


def test_codebook_times_its_scales_is_the_weight_to_the_bit() -> None:
    codes = weight("w8c_afp", (6, 3, 3, 3))
    data = written(encoding.BOOK, codes)
    book, indices = np.frombuffer(data, np.float32, 256, 4), np.frombuffer(data, np.uint8, codes.values.size, 4 + 1024)
    scales = np.frombuffer(written(encoding.BOOK_SCALES, codes, tagged=False), np.float32)
    assert np.array_equal(book[indices].reshape(6, -1) * scales[:, None], codes.dequantised().reshape(6, -1))


def test_a_codebook_keeps_outputs_in_the_range_of_float16() -> None:
    """Phones compute in float16; a layer of bare integers would give outputs a thousand times too large."""
    codes = weight("w8c_afp", (6, 3, 3, 3))
    book = np.frombuffer(written(encoding.BOOK, codes), np.float32, 256, 4)
    assert np.abs(book).max() <= 2 * np.abs(codes.dequantised()).max()


def test_zeros_only_have_finite_forms() -> None:
    codes = round_to_nearest(np.zeros((4, 8), np.float32), parse_scheme("w8c_afp"), "w")
    assert np.isfinite(np.frombuffer(written(encoding.BOOK, codes), np.float32, 256, 4)).all()


# --- graph ------------------------------------------------------------------------------------------------------------


def test_layers_that_it_does_not_know_are_refused_by_name() -> None:
    text = "7767517\n2 2\nInput in 0 1 in\nConvolution c 1 1 in out 0=4 1=1 5=0 6=16 9=1\n"
    layers = param.parse(text)
    (slot,) = slots.slots_of(layers)
    blob = Blob(slot, PARAMETER, "c.weight", (4, 4, 1, 1), (0, 1, 2, 3))
    with pytest.raises(ExportError, match="Convolution c cannot"):
        coded_graph(layers, [blob], Plan("w8c_afp").scheme)


def test_float_layers_stay_as_they_were(workshop: Workshop) -> None:
    """A plan that keeps everything in float changes no byte of the graph."""
    kept = build(workshop, "vae_decoder", Plan("w8c_afp", tuple((name, "fp32") for name in modules_of(workshop))))
    plain = build(workshop, "vae_decoder", Plan("fp32"))
    assert [(kept.folder / f).read_bytes() for f in kept.files] == [
        (plain.folder / f).read_bytes() for f in plain.files
    ]


def modules_of(workshop: Workshop) -> list[str]:
    return [blob.name for blob in workshop.traced("vae_decoder").blobs() if blob.kind == PARAMETER]
