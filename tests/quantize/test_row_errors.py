"""Losses of layers of a large component: a few inputs, one pass, plain rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusette.export import modules
from diffusette.quantize import moments, row_errors
from diffusette.quantize.calibrated import CodePicker, bare, layer_shapes
from diffusette.quantize.codes import round_to_nearest
from diffusette.quantize.row_errors import EstimateErrors
from diffusette.quantize.samples import Samples, middle
from diffusette.quantize.scheme import parse_scheme
from diffusette.stages.artifacts import Checkpoint

from .test_calibrated import samples

__all__ = ["samples"]  # a fixture


def test_errors_are_those_of_plain_rounding_over_the_inputs_of_each_layer(
    tiny_checkpoint: Checkpoint, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint.components["unet"]
    monkeypatch.setattr(row_errors, "ROWS", 4096)  # all inputs that there are: then the moments say the same
    monkeypatch.setattr(row_errors, "_WORK", 2000)  # layers are rounded in parts
    stage = EstimateErrors(source, samples, ("w4c_afp", "w8c_afp"), 2)
    found = replace(stage.run(tmp_path), digest="x")
    assert not (tmp_path / "inputs").exists()
    wrapped = modules.load(source)
    layers: Any = moments.weighted_modules(bare(wrapped))
    wanted = moments.measure_moments(wrapped, layers, samples.feeds("unet"))
    picker = CodePicker(source, (found,))
    assert set(found.parameters) == {f"{path}.weight" for path in layer_shapes(source)}
    for path in ("conv_in", "mid_block.resnets.0.conv1", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"):
        weight = layers[path].weight.numpy()
        for name in ("w4c_afp", "w8c_afp"):
            codes = round_to_nearest(weight, parse_scheme(name), path)
            miss = (codes.dequantised() - weight).reshape(len(weight), -1)
            import torch

            truth = moments.output_error(torch.from_numpy(miss), wanted[path]).numpy()
            assert np.allclose(picker.errors(f"{path}.weight", parse_scheme(name)), truth, rtol=1e-3)
            assert (picker.codes(f"{path}.weight", parse_scheme(name)).values == codes.values).all()


def test_a_few_inputs_are_kept_however_many_calls_there_are(
    tiny_checkpoint: Checkpoint, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(row_errors, "ROWS", 10)
    kept = row_errors._errors

    def count(weight: Any, scheme: Any, inputs: Any, name: str) -> Any:
        seen.append(len(inputs))
        return kept(weight, scheme, inputs, name)

    monkeypatch.setattr(row_errors, "_errors", count)
    EstimateErrors(tiny_checkpoint.components["unet"], samples, ("w8c_afp",), 2).run(tmp_path)
    assert max(seen) == 10
    assert min(seen) == 2  # of the timestep there is one a call


def test_the_vaes_samples_are_cut_to_their_middle_and_the_unets_are_not(tmp_path: Path) -> None:
    for part, name, shape in (
        ("vae_decoder", "latent_sample", (1, 4, 64, 40)),
        ("vae_encoder", "sample", (1, 3, 512, 320)),
        ("unet", "sample", (1, 4, 64, 40)),
    ):
        np.savez(tmp_path / f"{part}-000.npz", **{f"feed.{name}": np.zeros(shape, np.float32)})
    whole = Samples((tmp_path,), ("0" * 64,))
    cut = replace(whole, vae_side=32)
    assert cut.digest != whole.digest
    shapes = {part: next(iter(next(cut.feeds(part)).values())).shape for part in ("vae_decoder", "vae_encoder", "unet")}
    assert shapes == {"vae_decoder": (1, 4, 32, 32), "vae_encoder": (1, 3, 256, 256), "unet": (1, 4, 64, 40)}
    assert middle(np.arange(16).reshape(1, 1, 4, 4), 2).tolist() == [[[[5, 6], [9, 10]]]]
