"""What does not fit float16 is found before anything is written, and kept in float32 alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.safetensors_file import read_header
from diffusette.quantize.islands import ScanWeights, with_islands
from diffusette.quantize.plan import Plan
from diffusette.quantize.stored_weights import StoredWeights
from diffusette.runtimes.ncnn.target import NcnnTarget
from diffusette.runtimes.ort.target import OrtTarget
from diffusette.runtimes.protocol import Target
from diffusette.stages.artifacts import ComponentSource
from diffusette.stages.errors import ModelError
from diffusette.validate.reference.activation_peaks import ScanActivations
from diffusette.validate.reference.probes import ProbePlan, Probes

from ..models import Arrays, edit_tensors, poison
from ..runtimes.workshop import SIZE, Workshop, snr_db

SHAPES = {"a.weight": (64, 64), "b.weight": (64, 64), "b.bias": (64,), "c.weight": (640, 64)}
COOL = dict.fromkeys(SHAPES, 1.0)
VALUES, OUT = "encoder.layers.1.self_attn.v_proj.weight", "encoder.layers.1.self_attn.out_proj.weight"


def test_what_fits_changes_nothing() -> None:
    assert with_islands(Plan("fp16"), SHAPES, COOL, {"a": 100.0}, mixes=True) == (Plan("fp16"), ())


def test_a_heavy_weight_alone_stays_float32() -> None:
    plan, remarks = with_islands(Plan("fp16"), SHAPES, COOL | {"b.weight": 7e4}, {}, mixes=True)
    assert plan == Plan("fp16", (("b.weight", "keep"),))
    assert "b.weight reaches 7e+04, beyond float16" in remarks[0]
    assert "1 of 4 tensors stay float32, 8.3 % of the weights" in remarks[-1]


def test_weights_so_small_that_float16_has_few_bits_for_them_stay_float32() -> None:
    plan, remarks = with_islands(Plan("fp16"), SHAPES, COOL | {"b.weight": 1e-6, "a.weight": 0.0}, {}, mixes=True)
    assert plan == Plan("fp16", (("b.weight", "keep"),))
    assert "b.weight stays below 1e-06, where float16 has few bits" in remarks[0]


def test_a_module_with_hot_activations_stays_float32_and_is_named() -> None:
    plan, remarks = with_islands(Plan("fp16"), SHAPES, COOL, {"a": 5e4, "act": 2e4, "c": 10.0}, mixes=True)
    assert plan == Plan("fp16", (("a.weight", "keep"),))
    assert "activations reach 5e+04 at a (2 modules above 16376)" in remarks[0]


def test_a_runtime_of_one_float_keeps_the_whole_component() -> None:
    plan, remarks = with_islands(Plan("fp16"), SHAPES, COOL | {"a.weight": 1e9}, {}, mixes=False)
    assert plan == Plan("fp32")
    assert "all of it stays float32" in remarks[-1]


def test_integers_have_float32_scales_and_need_no_island() -> None:
    plan = Plan("w8c_afp", (("c.weight", "fp16"),))
    assert with_islands(plan, SHAPES, COOL | {"a.weight": 1e9}, {}, mixes=True) == (plan, ())
    mixed, _ = with_islands(plan, SHAPES, COOL | {"c.weight": 1e9}, {}, mixes=True)
    assert mixed.scheme("c.weight", (640, 64)).name == "fp32"
    assert mixed.scheme("a.weight", (64, 64)).name == "w8c_afp"


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> ComponentSource:
    """The demo's text encoder, one attention of which has values 2^21 times as large and undoes it after."""

    def scaled(tensors: Arrays) -> Arrays:
        for name in tensors:
            if name.endswith((VALUES, VALUES.removesuffix("weight") + "bias")):
                tensors[name] = tensors[name] * np.float32(2**21)
            elif name.endswith(OUT):
                tensors[name] = tensors[name] * np.float32(2**-21)
        return tensors

    source = open_checkpoint("demo").components["text_encoder"]
    file = tmp_path_factory.mktemp("heavy") / "model.safetensors"
    file.write_bytes(source.files[0].read_bytes())
    edit_tensors(file, scaled)
    return dataclasses.replace(source, files=(file,), digest="heavy")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, heavy: ComponentSource) -> Workshop:
    parts = {**open_checkpoint("demo").components, "text_encoder": heavy}
    return Workshop(tmp_path_factory.mktemp("islands"), parts)


@pytest.mark.parametrize("target", [OrtTarget(), NcnnTarget()], ids=["ort", "ncnn"])
def test_weights_that_overflow_are_found_and_the_model_still_answers(
    target: Target, shop: Workshop, heavy: ComponentSource, tmp_path: Path
) -> None:
    feeds = shop.feeds("text_encoder")
    np.savez(tmp_path / "text_encoder-000.npz", **{f"feed.{name}": value for name, value in feeds.items()})
    probes = Probes(tmp_path, ProbePlan(("x",)), SIZE, {"text_encoder": ("x",)}, "probes")
    weights = shop.run(ScanWeights(heavy)).read()
    hot = shop.run(ScanActivations(heavy, probes)).read()
    assert weights[VALUES] > 65504
    assert hot["encoder.layers.1.self_attn.v_proj"] > 65504
    shapes = StoredWeights(heavy, Plan("fp32"), None).shapes()
    with pytest.raises(ModelError, match=VALUES):
        StoredWeights(heavy, Plan("fp16"), None).read(VALUES)
    plan, remarks = with_islands(Plan("fp16"), shapes, weights, hot, mixes=target.mixes_floats)
    assert dict(plan.exceptions)[VALUES] == "keep"
    assert len(plan.exceptions) < 4
    assert any("stay float32" in remark for remark in remarks)
    model = target.build(heavy, SIZE, plan, shop.run)
    assert model.bits_per_weight < 18
    ids = {"input_ids": feeds["input_ids"].astype(model.inputs[0].dtype)}
    with target.open(model, threads=1) as session:
        (answer,) = session.run(ids).values()
    assert snr_db(shop.reference("text_encoder"), answer) > 45


def test_what_is_not_finite_is_refused_by_name(heavy: ComponentSource, tmp_path: Path) -> None:
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(heavy.files[0].read_bytes())
    stored = next(name for name in read_header(copy) if name.endswith(OUT))
    poison(copy, stored, 1, float("nan"))
    with pytest.raises(ModelError, match=f"text_encoder/{OUT} holds a NaN"):
        ScanWeights(dataclasses.replace(heavy, files=(copy,))).run(tmp_path)
