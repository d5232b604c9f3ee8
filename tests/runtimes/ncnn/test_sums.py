"""What an app gets that leaves ncnn's options alone: which layers a graph keeps from float16 sums and Winograd."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from diffusette.checkpoints.families.sd1 import SD1
from diffusette.runtimes.ncnn import masks, session
from diffusette.runtimes.ncnn.arithmetic import net_with
from diffusette.runtimes.ncnn.param import Layer, parse, render
from diffusette.runtimes.ncnn.sums import with_float32_sums
from diffusette.stages.artifacts import TargetModel

from .workshop import Workshop, ncnn_output

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated

HEAVY = ("Convolution", "Gemm", "InnerProduct", "MultiHeadAttention", "SDPA")


def layers_of(model: TargetModel) -> tuple[Layer, ...]:
    return parse((model.folder / model.files[0]).read_text())


def mask_of(layer: Layer) -> int:
    return layer.number(masks.KEY)


@pytest.mark.parametrize("component", tuple(SD1.components))
@pytest.mark.parametrize("scheme", ["fp16", "w4g64_afp"])
def test_no_convolution_is_winograds_and_no_vaes_is_one_matrix_product(
    component: str, scheme: str, workshop: Workshop
) -> None:
    for layer in layers_of(workshop.model(component, scheme)):
        if layer.type == "Convolution":
            assert mask_of(layer) & masks.NO_WINOGRAD
            is_vae = component.startswith("vae")
            assert bool(mask_of(layer) & masks.NO_SGEMM) == is_vae
            assert mask_of(layer) & masks.NO_FP16_ARITHMETIC or not is_vae


@pytest.mark.parametrize("scheme", ["fp16", "w8c_afp", "w4g64_afp"])
def test_a_unet_reads_its_sample_in_float32_and_adds_up_in_it_at_full_size(scheme: str, workshop: Workshop) -> None:
    layers = layers_of(workshop.model("unet", scheme))
    (reader,) = [layer for layer in layers if layer.type == "Convolution" and layer.inputs[0] == "sample"]
    assert masks.is_exact(reader)
    sums = [layer for layer in layers if layer.type in HEAVY and not masks.is_exact(layer)]
    in_float32 = [bool(mask_of(layer) & masks.NO_FP16_ARITHMETIC) for layer in sums]
    assert in_float32[0]
    assert in_float32[-1]
    changes = np.flatnonzero(np.diff(np.array(in_float32, int)))
    assert len(changes) == 2  # full size, deeper levels, full size
    assert not all(in_float32)


def test_a_network_of_one_size_adds_up_in_float32_everywhere() -> None:
    layers = [Layer("Convolution", "c", ("x",), ("y",), {}), Layer("Gemm", "g", ("y",), ("z",), {})]
    assert [mask_of(layer) & 1 for layer in with_float32_sums(layers, "unet")] == [1, 1]


def test_masks_of_a_layer_are_kept() -> None:
    exact = Layer("Gemm", "g", ("x",), ("y",), {masks.KEY: str(masks.EXACT)})
    assert with_float32_sums([exact], "unet") == (exact,)


@pytest.mark.parametrize("component", tuple(SD1.components))
def test_masks_change_nothing_in_float32_and_take_the_options_place(
    component: str, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, feeds = workshop.model(component, "fp16"), workshop.native(component, workshop.feeds(component))
    masked = ncnn_output(model, feeds)
    bare = [
        dataclasses.replace(layer, params={key: value for key, value in layer.params.items() if key != masks.KEY})
        for layer in layers_of(model)
    ]
    (tmp_path / model.files[0]).write_text(render(bare))
    (tmp_path / model.files[1]).symlink_to(model.folder / model.files[1])
    asked = {"use_winograd_convolution": False, "use_sgemm_convolution": not component.startswith("vae")}
    monkeypatch.setattr(session, "net_with", lambda options, threads: net_with({**options, **asked}, threads))
    without = ncnn_output(dataclasses.replace(model, folder=tmp_path), feeds)
    assert np.array_equal(masked, without)
