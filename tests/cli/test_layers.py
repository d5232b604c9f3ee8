"""Fifty faults planted in the built models of three runtimes: is the module that they are in the one that is named?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Final

import pytest
from diffusette.pipeline.artifacts import Checkpoint, TargetModel
from diffusette.pipeline.bundle import open_bundle
from diffusette.pipeline.cache import Cache
from diffusette.pipeline.gate import ask_pytorch
from diffusette.pipeline.hashing import sha256_of_file
from diffusette.pipeline.progress import Silent
from diffusette.pipeline.stage import Runner, run_stage
from diffusette.quantize.plan import Plan
from diffusette.runtimes.inputs import native_feeds, time_embedding_facts
from diffusette.runtimes.protocol import Feeds
from diffusette.runtimes.registry import get_target
from diffusette.runtimes.taps import Tapped
from diffusette.validate.layers.examine import Layer, examine, read_points
from diffusette.validate.layers.points import Point, find_points
from diffusette.validate.layers.report import ComponentLayers
from diffusette.validate.layers.segments import chunks_of, needed_later, segments_of, taps_of
from diffusette.validate.layers.trace import save_points
from diffusette.validate.reference import TorchModel, TorchSession

from ..faults import Fault, plant
from .conftest import TARGETS, Command

pytestmark = pytest.mark.slow

SIZE: Final = (64, 64)
BLOCK: Final = "down_blocks.0.attentions.0.transformer_blocks.0"
LAST: Final = "up_blocks.2.attentions.1.transformer_blocks.0"
LAYER: Final = "encoder.layers.1"

ANYWHERE: Final = (
    Fault("scaled weight", "unet", "down_blocks.1.resnets.0.conv1"),
    Fault("scaled weight", "unet", f"{BLOCK}.attn2.to_v"),
    Fault("scaled weight", "unet", "time_embedding.linear_1"),
    Fault("swapped channels", "unet", "mid_block.resnets.0.conv2"),
    Fault("swapped channels", "text_encoder", f"{LAYER}.self_attn.v_proj"),
    Fault("swapped channels", "unet", f"{BLOCK}.attn1.to_out.0"),
    Fault("dropped bias", "unet", "up_blocks.1.resnets.0.time_emb_proj"),
    Fault("dropped bias", "unet", f"{BLOCK}.norm2"),
    Fault("dropped bias", "text_encoder", f"{LAYER}.self_attn.k_proj"),  # which no gate can see: softmax removes it
    Fault("wrong epsilon", "unet", "down_blocks.0.resnets.0.norm1"),
    Fault("wrong epsilon", "text_encoder", "final_layer_norm"),
    Fault("swapped q and k", "unet", f"{BLOCK}.attn1"),
    Fault("rotated heads", "unet", f"{LAST}.attn1.to_v"),
    Fault("fp16 overflow", "unet", "up_blocks.1.resnets.0.conv1"),
    Fault("lost scale", "unet", "up_blocks.0.resnets.1.norm2"),
)
ONCE: Final = (
    Fault("scaled weight", "text_encoder", "embeddings.token_embedding"),
    Fault("fp16 overflow", "vae_decoder", "decoder.up_blocks.0.resnets.0.conv1"),
    Fault("lost scale", "vae_decoder", "decoder.conv_norm_out"),
    Fault("scaled weight", "vae_decoder", "decoder.mid_block.attentions.0.to_q"),
    Fault("swapped channels", "unet", "conv_out"),
)
FAULTS: Final = tuple((target, fault) for target in TARGETS for fault in ANYWHERE) + tuple(
    zip(("ort", "ncnn", "mnn", "ncnn", "mnn"), ONCE, strict=True)
)


@dataclass(frozen=True)
class Truth:
    """PyTorch's answers inside of one component, for one probe."""

    points: tuple[Point, ...]
    folder: Path
    feeds: Feeds


class Laboratory:
    """Looks into models of the demo in this process; PyTorch runs once a component."""

    def __init__(self, root: Path, checkpoint: Checkpoint, store: Cache) -> None:
        self.root = root
        self.checkpoint = checkpoint
        self.run: Runner = lambda stage: run_stage(stage, store, Silent())
        self.probes = ask_pytorch(checkpoint, SIZE, self.run)
        self.truth = cache(self._truth)
        self.time = time_embedding_facts(checkpoint.components["unet"].config)

    def _truth(self, component: str) -> Truth:
        source = self.checkpoint.components[component]
        points, events = find_points(source, SIZE)
        (probe,) = islice(self.probes.read(component), 1)
        folder = self.root / f"{component} points"
        folder.mkdir()
        with TorchSession(TorchModel(source, SIZE, Plan("fp16"))) as session:
            save_points(session, probe.feeds, events, {point.index for point in points}, folder)
        return Truth(points, folder, probe.feeds)

    def look_into(self, model: TargetModel) -> ComponentLayers:
        truth = self.truth(model.component)
        target = get_target(model.target)
        assert isinstance(target, Tapped)
        wiring = target.wiring(model, self.checkpoint.components[model.component], SIZE, self.run)
        inputs = native_feeds(truth.feeds, model.inputs, self.time)
        taps = taps_of(wiring, truth.points)
        chunks = chunks_of(segments_of(wiring, taps, inputs), 5)
        own = self.root / f"{len(list(self.root.iterdir()))} own"
        own.mkdir()
        layers: list[Layer] = []
        with target.open_taps(model, threads=2) as session:
            for chunk, keep in zip(chunks, needed_later(chunks), strict=True):
                layers += examine(
                    session,
                    chunk,
                    inputs=inputs,
                    reference=read_points(truth.folder),
                    full=None,
                    own=own,
                    keep=keep,
                    at={tensor: point.index for tensor, point in taps.items()},
                    batchless=wiring.batchless,
                    flat=wiring.flat,
                )
            runs = session.partial_runs
        return ComponentLayers(model.component, "fp16", "", tuple(layers), (), 95.0, runs, 0.0)

    def damaged(self, model: TargetModel, fault: Fault) -> TargetModel:
        """A copy of `model` with a fault in it."""
        folder = self.root / f"{len(list(self.root.iterdir()))} {model.target}"
        for file in model.files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(model.folder / file, folder / file)
        copy = replace(model, folder=folder)
        source = self.checkpoint.components[model.component]
        target = get_target(model.target)
        assert isinstance(target, Tapped)
        plant(fault, copy, source, target.wiring(copy, source, SIZE, self.run))
        return copy


@pytest.fixture(scope="module")
def laboratory(
    tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Checkpoint, cache: Path, converted: Path
) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("laboratory"), demo_checkpoint, Cache(cache))


@pytest.fixture(scope="module")
def models(converted: Path) -> Mapping[tuple[str, str], TargetModel]:
    bundles = {name: open_bundle(converted / name) for name in TARGETS}
    return {(name, part): bundle.model(part) for name, bundle in bundles.items() for part in bundle.components}


def guilty(fault: Fault) -> set[str]:
    """The modules that a fault is in."""
    if fault.kind == "swapped q and k":
        return {f"{fault.module}.to_q", f"{fault.module}.to_k"}
    return {fault.module}


def test_the_true_module_of_a_planted_fault_is_named_first(
    laboratory: Laboratory, models: Mapping[tuple[str, str], TargetModel]
) -> None:
    assert len(FAULTS) == 50
    others, missed = [], []
    for target, fault in FAULTS:
        found = laboratory.look_into(laboratory.damaged(models[target, fault.component], fault))
        named = [layer.module for layer in found.bad]
        if not set(named[:1]) & guilty(fault):
            others.append(f"{target}: {fault}: {named[:3]}")
        if not set(named[:3]) & guilty(fault):
            missed.append(f"{target}: {fault}: {named[:3]}")
    assert not missed
    assert len(others) <= 2, others


@pytest.mark.parametrize("target", TARGETS)
def test_a_sound_model_names_no_module(
    laboratory: Laboratory, models: Mapping[tuple[str, str], TargetModel], target: str
) -> None:
    for part in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        found = laboratory.look_into(models[target, part])
        points = laboratory.truth(part).points
        assert found.bad == (), found.bad
        assert found.left is None
        # ncnn has no names for some tensors between two operations without weights
        assert len({layer.point for layer in found.layers}) > 0.8 * len(points)
        assert found.partial_runs <= 25


def test_validate_names_the_module_of_a_damaged_bundle(command: Command, converted: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(converted / "ncnn", tmp_path / "ncnn"))
    opened = open_bundle(bundle)
    fault = Fault("scaled weight", "text_encoder", f"{LAYER}.mlp.fc1")
    from diffusette.export.checkpoint import open_checkpoint
    from diffusette.runtimes.taps import Wiring

    plant(fault, opened.model("text_encoder"), open_checkpoint("demo").components["text_encoder"], Wiring((), {}))
    manifest = json.loads((bundle / "manifest.json").read_text())
    for entry in manifest["components"]["text_encoder"]["files"]:
        entry["sha256"] = sha256_of_file(bundle / entry["path"])
    (bundle / "manifest.json").write_text(json.dumps(manifest))

    answer = command("validate", bundle, "--layers", "--no-image", "--json")
    assert answer.code == 5, answer.err
    report = answer.json
    assert report["first_bad"]["component"] == "text_encoder"
    assert report["first_bad"]["module"] == fault.module
    assert report["first_bad"]["snr_db"] == pytest.approx(20, abs=1)  # 10 % off
    rows = [row for row in report["layers"] if row["component"] == "text_encoder"]
    assert [row["module"] for row in rows if not row["ok"]] == [fault.module]
    assert all(row["carried_db"] < 95 for row in rows[-3:]), "everything after it is off as well"
    assert all(row["ok"] for row in report["layers"] if row["component"] != "text_encoder")
    assert all(row["lost_db"] > 40 for row in report["layers"] if row["ok"]), "what fp16 costs at each module"
    assert {part["partial_runs"] <= 25 for part in report["layers_measured"].values()} == {True}
    assert report["ranges"]["unet"][0]["peak"] > report["ranges"]["unet"][-1]["peak"] > 0
    assert not any(entry["near"] for entries in report["ranges"].values() for entry in entries)
