"""Weights of few bits on MNN: the same codes as on every target, where MNN's converter put its own."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusette.checkpoints.families.sd1 import SD1
from diffusette.quantize.codes import round_to_nearest
from diffusette.quantize.plan import Plan
from diffusette.quantize.quantized import quantized_weights
from diffusette.quantize.scheme import parse_scheme
from diffusette.quantize.stored_weights import StoredWeights
from diffusette.runtimes.inputs import native_feeds, time_embedding_facts
from diffusette.runtimes.mnn import coded, weight_file
from diffusette.runtimes.mnn.codes import decode, encode
from diffusette.runtimes.mnn.mnn_file import MnnFile
from diffusette.runtimes.mnn.session import MnnSession
from diffusette.runtimes.mnn.target import MnnTarget
from diffusette.stages.artifacts import Checkpoint, TargetModel
from diffusette.stages.errors import DiffusetteError, ToolCrashed, UnsupportedPrecision
from diffusette.validate.reference.torch_session import TorchModel, TorchSession

from ..workshop import SIZE, Array, Workshop, snr_db

LOW_BIT = [name for name in MnnTarget.precisions if name.endswith("_afp")]
MIXED = Plan("w4g64_afp", (("conv_in", "fp32"), ("conv_out", "fp16"), ("mid_block.attentions.0.proj_in", "w8c_afp")))
BRANCHED = Plan("w4g64r8_afp", (("conv_in", "w8cr4_afp"), ("conv_out", "fp16")))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Checkpoint) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("mnn-coded"), demo_checkpoint.components)


def build(shop: Workshop, component: str, plan: Plan) -> TargetModel:
    return MnnTarget().build(shop.sources[component], SIZE, plan, shop.run)


def stored(shop: Workshop, component: str, plan: Plan) -> StoredWeights:
    source = shop.sources[component]
    return StoredWeights(source, plan, quantized_weights(source, plan, shop.run))


def output(shop: Workshop, model: TargetModel) -> Array:
    source = shop.sources[model.component]
    facts = time_embedding_facts(source.config) if model.component == "unet" else {}
    with MnnSession(model, threads=1) as session:
        (result,) = session.run(native_feeds(shop.feeds(model.component), session.inputs, facts)).values()
    return result


def rounded_output(shop: Workshop, component: str, plan: Plan) -> Array:
    """PyTorch with the dequantised weights of the same codes."""
    source = shop.sources[component]
    with TorchSession(TorchModel(source, SIZE, plan, quantized_weights(source, plan, shop.run))) as session:
        (result,) = session.run(shop.feeds(component)).values()
    return result


# --- parity


@pytest.mark.parametrize(
    ("component", "scheme"), [*((name, "w8c_afp") for name in SD1.components), ("vae_decoder", "w4g64_afp")]
)
def test_it_computes_what_pytorch_computes_with_the_same_codes(component: str, scheme: str, shop: Workshop) -> None:
    plan = Plan(scheme)
    assert snr_db(rounded_output(shop, component, plan), output(shop, build(shop, component, plan))) >= 100


@pytest.mark.parametrize(
    "plan", [*map(Plan, LOW_BIT[1:]), MIXED, BRANCHED, Plan("w4cr8_afp")], ids=lambda plan: plan.label
)
def test_every_scheme_and_mixtures_run(plan: Plan, shop: Workshop) -> None:
    component = "unet" if plan in (MIXED, BRANCHED) else "text_encoder"
    assert snr_db(rounded_output(shop, component, plan), output(shop, build(shop, component, plan))) >= 100


@pytest.mark.parametrize("scheme", [*LOW_BIT, "w4g64r8_afp"])
def test_weights_take_the_bits_that_the_plan_says(scheme: str, shop: Workshop) -> None:
    plan = Plan(scheme)
    expected = plan.bits_per_weight(stored(shop, "vae_encoder", plan).shapes())
    assert build(shop, "vae_encoder", plan).bits_per_weight == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("component", ["text_encoder", "vae_encoder"])
def test_activations_of_8_bits_are_rounded_and_cost_what_that_costs(component: str, shop: Workshop) -> None:
    """Seen: 39 and 45 dB. More than 60 would mean that nothing is rounded."""
    model = build(shop, component, Plan("w8c_a8"))
    assert 30 <= snr_db(rounded_output(shop, component, Plan("w8c_a8")), output(shop, model)) <= 60


def test_a_model_tells_the_setting_that_it_was_compared_with(shop: Workshop) -> None:
    notes = {scheme: build(shop, "vae_encoder", Plan(scheme)).notes[0] for scheme in ("w8c_afp", "w8c_a8", "w4g64_afp")}
    assert "`memory` at 0" in notes["w8c_afp"]
    assert "`memory` at 2" in notes["w8c_a8"]
    assert "groups of weights for others" in notes["w4g64_afp"]


def test_rounded_and_float_activations_do_not_mix(shop: Workshop) -> None:
    with pytest.raises(UnsupportedPrecision, match=r"w8c_a8\+w8c_afp"):
        build(shop, "vae_encoder", Plan("w8c_a8", (("encoder.conv_in", "w8c_afp"),)))


def test_the_same_component_gives_the_same_bytes(shop: Workshop, tmp_path: Path) -> None:
    model = build(shop, "vae_encoder", Plan("w8c_afp"))
    source = shop.sources["vae_encoder"]
    again = MnnTarget().build(source, SIZE, Plan("w8c_afp"), Workshop(tmp_path, shop.sources).run)
    for file in model.files:
        assert (model.folder / file).read_bytes() == (again.folder / file).read_bytes()


# --- damage


@pytest.fixture
def copied(shop: Workshop, tmp_path: Path) -> TargetModel:
    model = build(shop, "vae_decoder", Plan("w8c_afp"))
    return dataclasses.replace(model, folder=Path(shutil.copytree(model.folder, tmp_path / "copy")))


def test_a_damaged_scale_is_seen_against_the_same_codes(copied: TargetModel, shop: Workshop) -> None:
    file = MnnFile(copied.folder / copied.files[0])
    data = next(data for data in file.external() if len(data.sizes) == 4 and data.sizes[1] >= 4 * 64)
    place = data.start + data.sizes[0]
    weights = bytearray(file.weight_file.read_bytes())
    weights[place : place + 4] = (np.frombuffer(weights, np.float32, 1, place) * np.float32(1.1)).tobytes()
    file.weight_file.write_bytes(weights)
    expected = rounded_output(shop, "vae_decoder", Plan("w8c_afp"))
    assert snr_db(expected, output(shop, copied)) < 85  # the gate's tolerance


@pytest.mark.parametrize("cut", [1, 4096])
def test_a_cut_weight_file_is_refused(cut: int, copied: TargetModel) -> None:
    weights = copied.folder / copied.files[1]
    weights.write_bytes(weights.read_bytes()[:-cut])
    with pytest.raises(DiffusetteError, match="bytes"):
        MnnSession(copied, threads=1)


def test_a_weight_under_another_name_is_refused(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """q_proj and k_proj have one shape: only their values tell them apart."""
    plan, source = Plan("w8c_afp"), shop.sources["text_encoder"]

    def swapped(*arguments: Any) -> dict[str, str]:
        owners = weight_file.owners_of(*arguments)
        return {name: parameter.replace("q_proj", "k_proj") for name, parameter in owners.items()}

    monkeypatch.setattr(coded, "owners_of", swapped)
    fresh = Workshop(tmp_path, shop.sources)
    with pytest.raises(ToolCrashed, match=r"does not hold .*k_proj\.weight"):
        MnnTarget().build(source, SIZE, plan, fresh.run)


# --- bytes


@pytest.mark.parametrize("scheme", ["w8c_afp", "w4c_afp", "w4g32_afp", "w6c_afp", "w3c_afp"])
@pytest.mark.parametrize("shape", [(3, 5), (4, 7, 3, 3)])
def test_codes_come_back_as_mnn_reads_them(scheme: str, shape: tuple[int, ...]) -> None:
    bits = parse_scheme(scheme).weight_bits
    codes = round_to_nearest(
        np.random.default_rng(3).standard_normal(shape).astype(np.float32), parse_scheme(scheme), "w"
    )
    buffer = encode(codes, bits)
    start = 6 + 2**bits
    assert np.frombuffer(buffer, np.int8, 2**bits, 6).tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    numbers = [
        int("".join(f"{byte:08b}" for byte in buffer[start:])[bits * index :][:bits], 2) - 2 ** (bits - 1)
        for index in range(codes.values.size)
    ]
    assert numbers == codes.values.ravel().tolist()
    if bits == 8:
        assert np.array_equal(decode(buffer, (shape[0], codes.values.size // shape[0])).ravel(), codes.values.ravel())


def test_codes_of_another_shape_are_refused() -> None:
    codes = round_to_nearest(np.ones((4, 6), np.float32), parse_scheme("w8c_afp"), "w")
    with pytest.raises(ValueError, match="4 x 7"):
        decode(encode(codes, 8), (4, 7))
