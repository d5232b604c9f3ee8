"""Memory_Low, which apps set: groups of weights in the form that MNN takes them for, and what it cannot run by name."""

from __future__ import annotations

import pytest
from diffusette.quantize.plan import Plan
from diffusette.quantize.scheme import parse_scheme
from diffusette.runtimes.arithmetic import FLOAT32, Opening
from diffusette.runtimes.inputs import native_feeds, time_embedding_facts
from diffusette.runtimes.isolation import open_isolated
from diffusette.runtimes.mnn.arithmetic import ARITHMETICS, GROUP_CHANNELS, MEMORY_LOW
from diffusette.runtimes.mnn.memory_low import unsupported
from diffusette.runtimes.mnn.mnn_file import MnnFile
from diffusette.runtimes.mnn.target import MnnTarget
from diffusette.stages.artifacts import Checkpoint, TargetModel

from ..workshop import SIZE, Array, Workshop, snr_db

GROUPED = ("w4g32_afp", "w4g64_afp", "w4g128_afp", "w4g64r16_afp")
_BINARY, _GATHERS = 7, (31, 32)  # OpType
OPENER = "diffusette.runtimes.registry:open_model"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Checkpoint) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("mnn-memory-low"), demo_checkpoint.components)


def build(shop: Workshop, component: str, plan: Plan) -> TargetModel:
    return MnnTarget().build(shop.sources[component], SIZE, plan, shop.run)


def fitted(scheme: str) -> Plan:
    return Plan(scheme, channels=MnnTarget.group_channels)


def output(shop: Workshop, model: TargetModel, arithmetic: str) -> Array:
    source = shop.sources[model.component]
    facts = time_embedding_facts(source.config) if model.component == "unet" else {}
    with open_isolated(OPENER, Opening(model, arithmetic), threads=1) as session:
        (result,) = session.run(native_feeds(shop.feeds(model.component), session.inputs, facts)).values()
    return result


@pytest.mark.parametrize("scheme", GROUPED)
def test_grouped_weights_are_right_under_memory_low(scheme: str, shop: Workshop) -> None:
    """Seen before: -29 and -22 dB. What is left over is the rounding of activations to 8 bits."""
    model = build(shop, "vae_decoder", fitted(scheme))
    assert unsupported(model) == {}
    assert snr_db(output(shop, model, FLOAT32), output(shop, model, MEMORY_LOW)) >= 25


@pytest.mark.parametrize("scheme", GROUPED[:2])
def test_groups_in_the_order_of_memory_are_refused_by_name(scheme: str, shop: Workshop) -> None:
    low = {each.name for each in ARITHMETICS if each.options.get("memory") == "Memory_Low"}
    found = unsupported(build(shop, "vae_decoder", Plan(scheme)))
    assert set(found) == low
    assert all("groups" in why for why in found.values())


@pytest.mark.parametrize("scheme", ["fp16", "w8c_afp", "w8c_a8", "w4c_afp"])
def test_a_scale_a_channel_runs_in_every_arithmetic(scheme: str, shop: Workshop) -> None:
    assert unsupported(build(shop, "vae_decoder", Plan(scheme))) == {}


def test_groups_that_fit_are_left_as_they_are() -> None:
    scheme = parse_scheme("w4g32_afp")
    assert scheme.of_whole_channels((8, 320), GROUP_CHANNELS) == scheme
    assert scheme.of_whole_channels((8, 64, 3, 3), GROUP_CHANNELS).name == "w4g144_afp"


@pytest.mark.parametrize(("shape", "stored"), [((8, 48), "w4g48_afp"), ((8, 4, 3, 3), "w4g36_afp")])
def test_a_short_row_has_one_scale(shape: tuple[int, ...], stored: str) -> None:
    """A block of 16 or 24 channels is wrong in float16 where there is one row: seen on a Cortex-A76."""
    assert parse_scheme("w4g32_afp").of_whole_channels(shape, GROUP_CHANNELS).name == stored


def test_a_long_row_that_no_group_divides_takes_8_bits() -> None:
    assert parse_scheme("w4g32_afp").of_whole_channels((8, 100, 3, 3), GROUP_CHANNELS).name == "w8c_afp"


def test_a_plan_of_whole_channels_has_another_key() -> None:
    assert fitted("w4g32_afp").key() != Plan("w4g32_afp").key()


@pytest.mark.parametrize("scheme", MnnTarget.precisions)
def test_ids_reach_their_lookup_as_integers(scheme: str, shop: Workshop) -> None:
    """What stands between must be arithmetic of integers: MNN keeps that in 32 bits whatever its `precision` is."""
    file = MnnFile(build(shop, "text_encoder", Plan(scheme)).folder / "text_encoder.mnn")
    ids, lookups = {"input_ids"}, 0
    for op in file.wires():
        if not ids & set(op.inputs):
            continue
        if op.type in _GATHERS:
            lookups += 1
            assert not ids & {op.inputs[0]}, "ids are looked up in"
            continue
        assert op.type == _BINARY, f"{op.name} of type {op.type} stands between ids and their lookup"
        ids |= set(op.outputs)
    assert lookups
