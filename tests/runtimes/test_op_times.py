"""Operations are timed in the very computation that a session runs, and named by PyTorch's modules."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from diffusette.runtimes.inputs import native_feeds
from diffusette.runtimes.op_times import OpTime, OpTimed
from diffusette.runtimes.ort.op_times import _rounds
from diffusette.runtimes.registry import TARGETS, get_target
from diffusette.runtimes.taps import Tapped
from diffusette.stages.artifacts import Checkpoint
from diffusette.stages.errors import ToolCrashed
from diffusette.validate.speed.op_profile import OpProfile, ops_table
from rich.console import Console

from .workshop import SIZE, Workshop, snr_db

CONVOLUTION = {"ort": "Conv", "ncnn": "Convolution", "mnn": "Convolution"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Checkpoint) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("ops"), demo_checkpoint.components)


# torch.jit, which ncnn's graphs come by, is deprecated
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_what_is_timed_is_what_a_session_computes(name: str, shop: Workshop) -> None:
    target = get_target(name)
    model = shop.build(target, "vae_decoder", "fp32")
    feeds = native_feeds(shop.feeds("vae_decoder"), model.inputs, {})
    with target.open(model, threads=1) as session:
        (expected,) = session.run(feeds).values()
    assert isinstance(target, OpTimed)
    times = target.time_ops(model, feeds, threads=1, runs=2)
    (computed,) = times.results.values()
    assert snr_db(expected, computed) > 120

    kinds = [op.op for op in times.ops]
    convolutions = sum(key.startswith("decoder") and "conv" in key for key in shop.module("vae_decoder").state_dict())
    assert kinds.count(CONVOLUTION[name]) >= convolutions / 2, "a weight and a bias each"
    assert all(op.ms >= 0 for op in times.ops)
    assert sum(op.ms for op in times.ops) > 0

    assert isinstance(target, Tapped)
    nodes = target.wiring(model, shop.sources["vae_decoder"], SIZE, shop.run).nodes
    modules = {tensor: node.module for node in nodes for tensor in node.outputs}
    named = {op.module or modules.get(op.tensor, "") for op in times.ops if op.op == CONVOLUTION[name]}
    assert {"decoder.conv_in", "decoder.up_blocks.0.resnets.0.conv2", "decoder.mid_block.resnets.0.conv1"} <= named


def test_mnn_times_the_kernels_that_round_activations(shop: Workshop) -> None:
    target = get_target("mnn")
    model = shop.build(target, "text_encoder", "w8c_a8")
    feeds = native_feeds(shop.feeds("text_encoder"), model.inputs, {})
    with target.open(model, threads=1) as session:
        (expected,) = session.run(feeds).values()
    assert isinstance(target, OpTimed)
    (computed,) = target.time_ops(model, feeds, threads=1, runs=1).results.values()
    assert np.array_equal(expected, computed), "with the weights widened instead, it would be 40 dB away"


def test_kernels_that_differ_from_run_to_run_are_not_averaged() -> None:
    kernels = [{"name": name} for name in ("a", "b", "a", "c")]
    with pytest.raises(ToolCrashed, match="not the same ones"):
        _rounds(kernels, 2, "unet")
    with pytest.raises(ToolCrashed, match="3 kernels in 2 runs"):
        _rounds(kernels[:3], 2, "unet")


def test_a_profile_adds_up_kinds_and_names_the_slowest(tmp_path: Path) -> None:
    ops = (OpTime("c1", "Conv", 3.0, "x", "conv_in"), OpTime("a", "Add", 2.0, "y"), OpTime("c2", "Conv", 5.0, "z"))
    profile = OpProfile(tmp_path, "unet", ops)
    facts = profile.to_json()
    assert facts["total_ms"] == 10
    assert facts["kinds"][0] == {"op": "Conv", "count": 2, "ms": 8.0, "share": 0.8}
    assert [row["name"] for row in facts["slowest"]] == ["c2", "c1", "a"]
    assert facts["slowest"][1]["module"] == "conv_in"
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(ops_table(profile))
    assert "where 10.00 ms go" in console.export_text()
