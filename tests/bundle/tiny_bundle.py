"""A tiny bundle: two components, one of them an ONNX graph with external data, three schedules. No real weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from diffusette.bundle.bundle import Bundle
from diffusette.bundle.manifest_entries import (
    ConditioningEntry,
    GuidanceEntry,
    ParityEntry,
    TargetEntry,
    TimeEmbedding,
)
from diffusette.bundle.pack import pack
from diffusette.bundle.pack_inputs import PackInputs, vae_entry
from diffusette.export.compiled_schedule import CompiledSchedule, ScheduleRow
from diffusette.stages.artifacts import Checkpoint, ComponentSource, TargetModel, TensorSpec, Variant
from diffusette.stages.cache import Cache

A_VARIANT = Variant(
    name="base",
    why="made by a test",
    guidance_mode="cfg",
    guidance=7.5,
    steps=20,
    recipe="sd1-fp16",
    prediction_type="epsilon",
    prediction_why="made by a test",
    task="text-to-image",
    input_channels=4,
)


def schedule(name: str, steps: int) -> CompiledSchedule:
    row = ScheduleRow(500.0, input_scale=1.0, latent=0.9, outputs=(0.1,), noise=0.0, signal=0.5, noise_level=0.5)
    return CompiledSchedule(name, "AScheduler", steps, 0.0, 1.0, "epsilon", "leading", (row,) * steps)


def write_onnx(file: Path, *, location: str = "model.onnx_data") -> None:
    """y = x + w, with w of 16 floats in `location`."""
    import onnx
    from onnx import TensorProto, helper

    w = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[16], data_location=TensorProto.EXTERNAL)
    w.external_data.add(key="location", value=location)
    w.external_data.add(key="length", value="64")
    specs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [16]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", specs[:1], specs[1:], [w])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), file)


@pytest.fixture(scope="session")
def cells_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """One for all cells of docs/kinds.md and all workers of a parallel run: many have an architecture in common."""
    base = tmp_path_factory.getbasetemp()
    return Cache((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cells-cache")


@pytest.fixture
def inputs(tmp_path: Path) -> PackInputs:
    root = tmp_path / "checkpoint"
    cache, tokenizer = tmp_path / "cache", root / "tokenizer"
    for folder in (tokenizer, cache / "unet", cache / "vae"):
        folder.mkdir(parents=True)
    (root / "LICENSE.txt").write_text("do no harm\n")
    (tokenizer / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}}')
    write_onnx(cache / "unet" / "model.onnx")
    (cache / "unet" / "model.onnx_data").write_bytes(bytes(64))
    (cache / "vae" / "model.onnx").write_bytes(b"")
    (cache / "vae" / "model.ort").write_bytes(b"ORTM")
    vae = {"scaling_factor": 0.18215, "_name_or_path": "somewhere/private"}
    source = ComponentSource("vae_decoder", "sd1", vae, (), "1" * 64, 16, "float32")
    ids = {"max_tokens": 77, "pad_id": 1, "bos_id": 0, "eos_id": 1}
    other = {"ort": ("model.ort",)}
    specs = (TensorSpec("x", "float32", (16,)),), (TensorSpec("y", "float32", (16,)),)
    return PackInputs(
        checkpoint=Checkpoint(
            name="tiny",
            root=root,
            family="sd1",
            why="made by a test",
            components={"vae_decoder": source},
            scheduler={"_class_name": "DDIMScheduler"},
            tokenizer=tokenizer,
            sources={"unet/config.json": "2" * 64, "model_index.json": "3" * 64},
            digest="4" * 64,
            variant=A_VARIANT,
        ),
        target=TargetEntry(name="ort", version="1.32.0", min_runtime="1.18"),
        models=(
            TargetModel(cache / "unet", "unet", "ort", "fp32", ("model.onnx", "model.onnx_data"), *specs, 32.0),
            TargetModel(cache / "vae", "vae_decoder", "ort", "fp16", ("model.onnx",), *specs, 16.0, other, ("small",)),
        ),
        tokenizers=((tokenizer, {"kind": "clip", "files": ["tokenizer.json"], **ids}),),
        schedules=(schedule("ddim", 2), schedule("ddim", 3), schedule("euler", 2)),
        guidance=GuidanceEntry(mode="cfg", default=7.5),
        conditioning=ConditioningEntry(variant="base", why="made by a test", text_encoders=1, input_channels=4),
        vae=vae_entry(vae),
        time_embedding=TimeEmbedding(dim=48, flip_sin_to_cos=True, freq_shift=0.0, max_period=10000.0),
        size=(64, 64),
        recipe="schema = 1  # ünchanged\n",
        tools={"onnx": "1.23.2"},
        gate="passed",
        parity={"unet": ParityEntry(max_abs=0.0, snr_db=float("inf"), psnr_db=float("inf"))},
    )


@pytest.fixture
def bundle(inputs: PackInputs, tmp_path: Path) -> Bundle:
    return pack(inputs, tmp_path / "out")
