"""The model that narrow copies tell of is, to the byte, the one that MNN's converter makes of the whole network."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, Final

import numpy as np
import pytest
from diffusette.checkpoints import network
from diffusette.checkpoints.families.family import TAKES_RESIDUALS
from diffusette.export.graph import Graph
from diffusette.quantize.plan import Plan
from diffusette.runtimes.mnn import convert, narrow
from diffusette.runtimes.mnn.copies import _check_told_apart
from diffusette.runtimes.mnn.flat import UnknownFormError, pack, read
from diffusette.runtimes.mnn.half import cut_to_half
from diffusette.runtimes.mnn.narrow import LearnMnn, learned
from diffusette.runtimes.mnn.native import mnnconvert
from diffusette.runtimes.mnn.target import MnnTarget
from diffusette.runtimes.narrowing import NarrowCopy, NotAlikeError, carried, narrow_copy
from diffusette.stages.artifacts import ComponentSource, TargetModel
from diffusette.stages.errors import NoRoom, ToolCrashed
from diffusette.stages.failures import FULL_DISK
from safetensors.numpy import save_file

SIZE: Final = (64, 64)
UNET: Final[dict[str, Any]] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SDXL: Final[dict[str, Any]] = {
    **UNET,
    "block_out_channels": [64, 128],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [4, 8],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 72,
    "cross_attention_dim": 56,
}
SD2: Final[dict[str, Any]] = {
    **UNET,
    "block_out_channels": [64, 128],
    "attention_head_dim": [4, 8],  # of one size: the narrow copy has a single one
    "use_linear_projection": True,
}
VAE: Final[dict[str, Any]] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
TEXT: Final[dict[str, Any]] = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "vocab_size": 99,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
CONTROLNET: Final[dict[str, Any]] = {
    **{key: value for key, value in UNET.items() if key not in ("sample_size", "out_channels", "up_block_types")},
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [4, 4, 8, 8],
}
WIDE: Final = {
    "steered unet": ("unet", "sd1", {**UNET, TAKES_RESIDUALS: True}),
    "controlnet": ("controlnet", "sd1", CONTROLNET),
    "sd1 unet": ("unet", "sd1", UNET),
    "sd2 unet": ("unet", "sd2", SD2),
    "sdxl unet": ("unet", "sdxl", SDXL),
    "vae_decoder": ("vae_decoder", "sd1", VAE),
    "text_encoder": ("text_encoder", "sd1", TEXT),
    "text_encoder_2": ("text_encoder_2", "sdxl", {**TEXT, "projection_dim": 64, "eos_token_id": 2}),
}


class Shop:
    """Runs equal stages once, in folders of their own below `root`."""

    def __init__(self, root: Path, done: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.root = root
        self.done: dict[str, Any] = dict(done)

    def run(self, stage: Any) -> Any:
        if repr(stage) not in self.done:
            into = self.root / f"{len(self.done)}-{stage.name}"
            into.mkdir()
            self.done[repr(stage)] = dataclasses.replace(stage.run(into), digest=into.name)
        return self.done[repr(stage)]

    def source(self, name: str) -> ComponentSource:
        component, family, config = WIDE[name]
        file = self.root / f"{name}.safetensors"
        bare = ComponentSource(component, family, config, (), "", 0, "float32")
        if not file.exists():
            generator = np.random.default_rng(7)
            weights = network.build(bare).state_dict()
            save_file({k: generator.standard_normal(v.shape, np.float32) * 0.05 for k, v in weights.items()}, file)
        return dataclasses.replace(bare, files=(file,), digest=name, parameters=10**6)

    def build(self, name: str, plan: Plan) -> TargetModel:
        return MnnTarget().build(self.source(name), SIZE, plan, self.run)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("mnn-narrow"))


def both_ways(name: str, precision: str, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> list[TargetModel]:
    """A model that MNN's converter made of the whole network, and one that it made of narrow copies."""
    monkeypatch.setattr(convert, "EXTERNAL_ABOVE", 0)
    directly = shop.build(name, Plan(precision))
    monkeypatch.setattr(narrow, "EXTERNAL_ABOVE", 0)
    return [directly, shop.build(name, Plan(precision))]


FORMS: Final = ("fp16", "fp32", "w8c_afp", "w4g32_afp", "w4g32r6_afp")
OTHERS: Final = {
    "steered unet": "fp32",
    "controlnet": "fp16",
    "sd2 unet": "fp16",
    "sdxl unet": "w8c_afp",
    "vae_decoder": "w4g32_afp",
    "text_encoder": "fp32",
    "text_encoder_2": "fp16",
}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("sd1 unet", FORMS[0]),
        *(pytest.param("sd1 unet", form, marks=pytest.mark.slow) for form in FORMS[1:]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS.items()),
    ],
)
def test_narrow_copies_tell_the_same_bytes_as_the_network_itself(
    name: str, precision: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    directly, narrowly = both_ways(name, precision, shop, monkeypatch)
    assert narrowly.folder != directly.folder
    assert narrowly.notes == directly.notes
    assert [narrowly.files, narrowly.bits_per_weight] == [directly.files, directly.bits_per_weight]
    for file in directly.files:
        assert (narrowly.folder / file).read_bytes() == (directly.folder / file).read_bytes()


def test_a_network_that_cannot_be_learned_is_converted_whole_and_says_why(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusette.runtimes.mnn.widen.carried", refused)
    directly, fallen = both_ways("vae_decoder", "fp32", shop, monkeypatch)
    assert fallen.notes == ("MNN's converter got the whole network: 32 at one width, 40 at the other",)
    for file in directly.files:
        assert (fallen.folder / file).read_bytes() == (directly.folder / file).read_bytes()


def refused(*_: object) -> int:
    raise NotAlikeError("32 at one width, 40 at the other")


def test_a_crash_on_a_narrow_copy_is_forgotten(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {stage: made for stage, made in shop.done.items() if isinstance(made, Graph)}
    shop = Shop(tmp_path, known)

    def crash(*_: object) -> str:
        raise ToolCrashed("mnnconvert crashed with SIGSEGV at 31 MiB; its last lines:\n  | no memory")

    monkeypatch.setattr(narrow, "EXTERNAL_ABOVE", 0)
    monkeypatch.setattr(convert, "EXTERNAL_ABOVE", 0)
    monkeypatch.setattr(narrow, "mnnconvert", crash)
    directly = shop.build("sd1 unet", Plan("fp16"))
    why = "a narrow copy could not be converted: mnnconvert crashed with SIGSEGV at 31 MiB; its last lines:"
    assert directly.notes == (f"MNN's converter got the whole network: {why}",)
    monkeypatch.setattr(narrow, "mnnconvert", mnnconvert)
    again = shop.build("sd1 unet", Plan("fp16"))
    assert again.notes == ()
    for file in directly.files:
        assert (again.folder / file).read_bytes() == (directly.folder / file).read_bytes()


def test_a_copy_that_broke_off_on_a_full_disk_is_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise UnknownFormError("the file ends within a table")

    graph = Graph(tmp_path, "unet", (), ())
    stage = LearnMnn(graph, graph, 8, 1, whole=False, aliases={}, form="fp16")
    monkeypatch.setattr(narrow, "Copies", broken)
    assert stage.run(tmp_path).note == "the file ends within a table"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=FULL_DISK - 1))
    with pytest.raises(NoRoom, match="the disk is full: the file ends within a table"):
        stage.run(tmp_path)


def test_a_network_that_is_small_or_has_no_unit_is_converted_whole(shop: Shop) -> None:
    def no_stage(stage: Any) -> Any:
        raise AssertionError(stage)

    source = shop.source("sd1 unet")
    assert learned(source, SIZE, Plan("fp32"), no_stage) == (None, "")
    odd = dataclasses.replace(source, parameters=2**30, config={**UNET, "block_out_channels": [24, 40]})
    assert learned(odd, SIZE, Plan("fp32"), no_stage) == (None, "its channels have no common unit that is far smaller")
    text = dataclasses.replace(shop.source("text_encoder"), parameters=2**30)
    form, reason = learned(text, SIZE, Plan("w8c_afp"), no_stage)
    assert form is None
    assert "token embeddings" in reason


def test_a_narrow_copy_has_heads_that_widen_to_the_real_ones() -> None:
    sd15 = {**UNET, "block_out_channels": [320, 640], "norm_num_groups": 32, "attention_head_dim": 8}
    copy = narrow_copy("unet", sd15)
    config = {**sd15, "block_out_channels": [32, 64], "cross_attention_dim": 1021}
    assert copy == NarrowCopy(config, 1, 10, whole=False, aliases={1021: 24})
    by_level = narrow_copy(
        "unet", {**sd15, "attention_head_dim": [5, 10], "down_block_types": ["CrossAttnDownBlock2D"] * 2}
    )
    assert by_level is not None
    assert (by_level.width, by_level.whole, by_level.config["attention_head_dim"]) == (2, True, [1, 2])
    upper = narrow_copy("unet", {**sd15, "attention_head_dim": [5, 10], "down_block_types": SDXL["down_block_types"]})
    assert upper is not None
    assert (upper.width, upper.config["attention_head_dim"]) == (1, [1, 1])
    assert narrow_copy("unet", {**sd15, "block_out_channels": [32, 64]}) is None


@pytest.mark.parametrize(
    ("one", "two", "wide"), [(32, 32, 32), (32, 40, 320), (1024, 1600, 102400), (0, 0, 0), (-1, -1, -1)]
)
def test_numbers_are_carried_from_and_to_widths_that_are_no_whole_units(one: int, two: int, wide: int) -> None:
    widths = (1, Fraction(5, 4))
    assert carried(one, two, widths, 10) == wide
    assert carried(one, wide, (1, 10), Fraction(5, 4)) == two


def test_a_number_that_stands_for_another_is_put_back() -> None:
    assert carried(1021, 1021, (1, 2), 10, {1021: 768}) == 768
    assert carried(1020, 1020, (1, 2), 10, {1021: 768}) == 1020


def test_a_width_at_which_a_number_is_not_whole_is_none() -> None:
    with pytest.raises(NotAlikeError, match="2 at width 1 is 20 at 10"):
        carried(2, 20, (1, 10), Fraction(5, 4))


def test_constants_that_only_a_copy_makes_equal_are_told_apart() -> None:
    real = {(0, 1): np.array([1, 64, 64, 320]), (1, 1): np.array([1, 320, 64, 64])}
    _check_told_apart({(0, 1): np.array([1, 64, 64, 32]), (1, 1): np.array([1, 32, 64, 64])}, real)
    with pytest.raises(NotAlikeError, match="two constants"):
        _check_told_apart({use: np.array([1, 64, 64, 64]) for use in real}, real)


@pytest.mark.filterwarnings("ignore:overflow")  # of the next number after the largest
@pytest.mark.parametrize("value", [0.1, -0.1, 1 / 3, 65519.0, 7e4, -1e9, 3e-8, 6.1e-5, 0.0, -0.0])
def test_float16_is_cut_towards_zero(value: float) -> None:
    half = cut_to_half(np.array([value], np.float32))
    assert abs(float(half[0])) <= abs(np.float32(value))
    exact = np.clip(np.float32(value), -65504, 65504)
    assert abs(np.nextafter(half, np.float16(np.copysign(np.inf, value))).astype(np.float64)[0]) >= abs(exact)


def test_a_field_that_is_not_known_ends_the_reading() -> None:
    net = {"bizCode": "diffusette", "oplists": [{"main_type": 200, "name": "x", "main": {}}], "mnn_uuid": "0"}
    assert read(pack({**net, "oplists": []}))["oplists"] == []
    assert read(pack({k: v for k, v in net.items() if k != "oplists"})) == {"bizCode": "diffusette", "mnn_uuid": "0"}
    with pytest.raises(UnknownFormError):
        read(pack(net))
