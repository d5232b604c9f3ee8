"""The graph that two narrow networks tell of is the one that pnnx makes of the wide one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
from diffusette.checkpoints.families.family import TAKES_RESIDUALS
from diffusette.runtimes import narrowing as widths
from diffusette.runtimes.narrowing import NotAlikeError, narrowing
from diffusette.runtimes.ncnn.lower import without_weights
from diffusette.runtimes.ncnn.narrow import widened
from diffusette.runtimes.ncnn.param import Layer
from diffusette.runtimes.ncnn.trace import TraceNcnn, small_sizes

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
    "hidden_size": 64,
    "intermediate_size": 256,
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
    "unet": {**UNET, TAKES_RESIDUALS: True},
    "controlnet": CONTROLNET,
    "vae_decoder": VAE,
    "text_encoder": TEXT,
}


def traced(component: str, into: Path) -> tuple[dict[str, bytes], str]:
    source = without_weights(component, WIDE[component])
    into.mkdir()
    made = TraceNcnn(component, source.config, small_sizes(source, (64, 64))).run(into)
    return {file.name: file.read_bytes() for file in into.iterdir()}, made.note


@pytest.mark.slow
@pytest.mark.parametrize("component", WIDE)
def test_narrow_copies_tell_the_same_bytes_as_the_network_itself(
    component: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrowly, note = traced(component, tmp_path / "narrow")
    assert note == ""
    monkeypatch.setattr(widths, "WORTHWHILE", 10**6)
    directly, note = traced(component, tmp_path / "direct")
    assert note != ""
    assert narrowly == directly


def test_a_network_that_is_narrow_already_is_converted_as_it_is() -> None:
    assert narrowing("unet", {**UNET, "block_out_channels": [16, 32]}) is None
    assert narrowing("unet", {**UNET, "block_out_channels": [20, 40]}) is None  # no whole groups
    assert narrowing("text_encoder", {**TEXT, "num_attention_heads": 4}) is None
    assert narrowing("controlnet", {**CONTROLNET, "block_out_channels": [16, 32]}) is None
    found = narrowing("unet", UNET)
    assert found
    assert (found.widths, found.real) == ((1, 2), 4)
    assert [config["block_out_channels"] for config in found.configs] == [[8, 16], [16, 32]]


def layer(**params: str) -> Layer:
    return Layer("Any", "any", ("in",), ("out",), {int(key[1:]): value for key, value in params.items()})


@pytest.mark.parametrize(
    ("one", "two", "wide"),
    [
        ("77", "77", "77"),
        ("32", "64", "320"),
        ("9216", "36864", "921600"),
        ("2,32,-233", "2,64,-233", "2,320,-233"),
        ('"*(0h,0w),32"', '"*(0h,0w),64"', '"*(0h,0w),320"'),
        ("1.000000e-05", "1.000000e-05", "1.000000e-05"),
    ],
)
def test_numbers_grow_by_the_power_that_fits_both_widths(one: str, two: str, wide: str) -> None:
    (made,) = widened([[layer(k0=one)], [layer(k0=two)]], (1, 2), 10)
    assert made.params[0] == wide


@pytest.mark.parametrize(
    ("one", "two"),
    [("32", "65"), ("32", "256"), ("1.5e-01", "3.0e-01"), ("1,2", "1,2,3"), ('"0w,32"', '"0h,64"')],
)
def test_what_fits_no_power_ends_the_attempt(one: str, two: str) -> None:
    with pytest.raises(NotAlikeError):
        widened([[layer(k0=one)], [layer(k0=two)]], (1, 2), 10)


def test_graphs_of_another_structure_end_the_attempt() -> None:
    other = Layer("Other", "any", ("in",), ("out",), {0: "1"})
    with pytest.raises(NotAlikeError):
        widened([[layer(k0="1")], [other]], (1, 2), 10)
    with pytest.raises(NotAlikeError):
        widened([[layer(k0="1")], [layer(k1="1")]], (1, 2), 10)
    with pytest.raises(NotAlikeError):
        widened([[layer(k0="1")], []], (1, 2), 10)
