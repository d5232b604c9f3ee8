"""ncnn's GroupNorm over large groups, taken apart: the same numbers, added up in two steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusette.quantize.plan import Plan
from diffusette.runtimes.ncnn import param, steady_norms
from diffusette.runtimes.ncnn.param import Layer
from diffusette.runtimes.ncnn.target import NcnnTarget
from diffusette.stages.artifacts import TargetModel

from .workshop import Workshop, ncnn_output, rounded_output, snr_db

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated

SIZE = (128, 96)


def kinds(model: TargetModel) -> list[str]:
    return [layer.type for layer in param.parse((model.folder / model.files[0]).read_text())]


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
@pytest.mark.parametrize("scheme", ["fp32", "w8c_afp"])
def test_norms_taken_apart_are_as_exact(
    component: str, scheme: str, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steady_norms, "LONGEST_CHAIN", 2000)
    fresh = Workshop(tmp_path, workshop.sources)  # the limit is no part of a stage's key
    model = NcnnTarget().build(fresh.sources[component], SIZE, Plan(scheme), fresh.run)
    feeds = fresh.feeds(component, SIZE)
    output = ncnn_output(model, fresh.native(component, feeds, SIZE))
    assert snr_db(rounded_output(fresh, component, Plan(scheme), feeds, SIZE), output) > 100
    found = kinds(model)
    assert found.count("Reduction") >= 8  # four a norm
    assert "GroupNorm" in found  # small ones stay


def test_pictures_up_to_512_by_512_keep_the_norms_of_ncnn(workshop: Workshop) -> None:
    model = NcnnTarget().build(workshop.sources["vae_decoder"], (512, 512), Plan("fp16"), workshop.run)
    assert "Reduction" not in kinds(model)


def test_sizes_are_followed_through_strides_upsampling_and_around_attention() -> None:
    def layer(kind: str, inputs: str, output: str, **params: str) -> Layer:
        return Layer(kind, output, tuple(inputs.split()), (output,), {int(k[1:]): v for k, v in params.items()})

    layers = [
        layer("Input", "", "x"),
        layer("Convolution", "x", "down", p3="2"),
        layer("Reshape", "down", "rows"),
        layer("BinaryOp", "rows down", "sum"),
        layer("Interp", "sum", "up", p1="2.0", p2="2.0"),
    ]
    found = steady_norms._extents(layers, {"x": (64, 48)})
    assert found == {"x": (64, 48), "down": (32, 24), "sum": (32, 24), "up": (64, 48)}
