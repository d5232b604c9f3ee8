"""The model that narrow copies tell of is, to the byte, the one that MNN's converter makes of the whole network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from diffusette.export import modules
from diffusette.pipeline.artifacts import ComponentSource, TargetModel
from diffusette.quantize.plan import Plan
from diffusette.runtimes.mnn import convert, narrow
from diffusette.runtimes.mnn.target import MnnTarget
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
WIDE: Final = {
    "sd1 unet": ("unet", "sd1", UNET),
    "sdxl unet": ("unet", "sdxl", SDXL),
    "vae_decoder": ("vae_decoder", "sd1", VAE),
    "text_encoder": ("text_encoder", "sd1", TEXT),
}


class Shop:
    """Runs equal stages once, in folders of their own below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done: dict[str, Any] = {}

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
            weights = modules.build(bare).state_dict()
            save_file({k: generator.standard_normal(v.shape, np.float32) * 0.05 for k, v in weights.items()}, file)
        return dataclasses.replace(bare, files=(file,), digest=name, parameters=10**6)

    def build(self, name: str, plan: Plan) -> TargetModel:
        return MnnTarget().build(self.source(name), SIZE, plan, self.run)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("mnn-narrow"))


@pytest.mark.parametrize(
    ("name", "precision"),
    [(n, p) for n in WIDE for p in ("fp32", "fp16", "w8c_afp", "w4g32_afp") if n != "text_encoder" or p[0] == "f"],
)
def test_narrow_copies_tell_the_same_bytes_as_the_network_itself(
    name: str, precision: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "EXTERNAL_ABOVE", 0)
    directly = shop.build(name, Plan(precision))
    monkeypatch.setattr(narrow, "EXTERNAL_ABOVE", 0)
    narrowly = shop.build(name, Plan(precision))
    assert narrowly.folder != directly.folder
    assert narrowly.notes == directly.notes
    assert [narrowly.files, narrowly.bits_per_weight] == [directly.files, directly.bits_per_weight]
    for file in directly.files:
        assert (narrowly.folder / file).read_bytes() == (directly.folder / file).read_bytes()
