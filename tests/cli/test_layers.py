"""Faults planted in the built models of three runtimes: is the module that they are in the one that is named?"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Final

import pytest
from diffusette.bundle.bundle import open_bundle
from diffusette.quantize.plan import Plan
from diffusette.quantize.quantized import quantized_weights
from diffusette.quantize.stored_weights import StoredWeights
from diffusette.runtimes.inputs import native_feeds, time_embedding_facts
from diffusette.runtimes.protocol import Feeds
from diffusette.runtimes.registry import get_target
from diffusette.runtimes.taps import Tapped, Wiring
from diffusette.stages.artifacts import Checkpoint, TargetModel
from diffusette.stages.cache import Cache
from diffusette.stages.progress import Silent
from diffusette.stages.run_stage import run_stage
from diffusette.stages.stage import Runner
from diffusette.validate.gate import ask_pytorch
from diffusette.validate.layers.examine import Subject, examine, layers_of, read_points
from diffusette.validate.layers.pieces import pieces_of
from diffusette.validate.layers.points import Point, find_points
from diffusette.validate.layers.report import ComponentLayers
from diffusette.validate.layers.segments import reshaped, segments_of, taps_of
from diffusette.validate.layers.trace import save_points
from diffusette.validate.reference.torch_session import TorchModel, TorchSession

from ..faults import Fault, guilty, plant
from ..validate.chromium import chromium, visit
from .conftest import TARGETS, Command
from .test_demo import rewrite_hashes

pytestmark = pytest.mark.slow

SIZE: Final = (64, 64)
BLOCK: Final = "down_blocks.0.attentions.0.transformer_blocks.0"
LAST: Final = "up_blocks.2.attentions.1.transformer_blocks.0"
MIDDLE: Final = "mid_block.attentions.0.transformer_blocks.0"
LAYER: Final = "encoder.layers.1"
PARTS: Final = ("text_encoder", "unet", "vae_decoder", "vae_encoder")

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
CODED: Final = (
    Fault("one scale lost", "unet", "down_blocks.1.resnets.0.conv1"),
    Fault("one scale lost", "unet", f"{MIDDLE}.ff.net.2"),
    Fault("swapped scales", "unet", f"{MIDDLE}.attn1.to_out.0"),
    Fault("swapped scales", "unet", f"{MIDDLE}.ff.net.2"),
    Fault("swapped scales", "unet", "mid_block.resnets.1.conv1"),
    Fault("shifted index", "unet", "down_blocks.1.resnets.0.conv1"),
    Fault("shifted index", "unet", "mid_block.resnets.1.conv1"),
    Fault("wrong zero point", "unet", f"{MIDDLE}.attn1.to_out.0"),
    Fault("wrong zero point", "unet", f"{MIDDLE}.ff.net.2"),
)
PLANS: Final = {
    "fp16": Plan("fp16"),
    "codes": Plan("w8c_afp", ((f"{MIDDLE}.ff.net.2", "w4g64_afp"), ("mid_block.resnets.1.conv1", "w4g64_afp"))),
}
FAULTS: Final = (
    *((target, "fp16", fault) for target in TARGETS for fault in ANYWHERE),
    *((target, "fp16", fault) for target, fault in zip(("ort", "ncnn", "mnn", "ncnn", "mnn"), ONCE, strict=True)),
    *((target, "codes", fault) for target in TARGETS for fault in CODED),
)


@dataclass(frozen=True)
class Truth:
    """PyTorch's answers inside of one component, for one probe, with weights as a plan stores them."""

    stored: StoredWeights
    points: tuple[Point, ...]
    folder: Path
    feeds: Feeds


class Laboratory:
    """Looks into models of the demo in this process; PyTorch runs once for a component and a plan."""

    def __init__(self, root: Path, checkpoint: Checkpoint, store: Cache) -> None:
        self.root = root
        self.checkpoint = checkpoint
        self.run: Runner = lambda stage: run_stage(stage, store, Silent())
        self.probes = ask_pytorch(checkpoint, SIZE, self.run)
        self.points = cache(lambda component: find_points(checkpoint.components[component], SIZE))
        self.truth = cache(self._truth)
        self.model = cache(self._model)
        self.wiring = cache(self._wiring)
        self.time = time_embedding_facts(checkpoint.components["unet"].config)

    def folder(self, name: str) -> Path:
        """A new folder."""
        return Path(tempfile.mkdtemp(prefix=f"{name} ", dir=self.root))

    def _model(self, target: str, component: str, plan: str) -> TargetModel:
        return get_target(target).build(self.checkpoint.components[component], SIZE, PLANS[plan], self.run)

    def _wiring(self, target: str, component: str, plan: str) -> Wiring:
        tapped = get_target(target)
        assert isinstance(tapped, Tapped)
        source = self.checkpoint.components[component]
        return tapped.wiring(self.model(target, component, plan), source, SIZE, self.run)

    def _truth(self, component: str, name: str) -> Truth:
        source, plan = self.checkpoint.components[component], PLANS[name]
        points, events = self.points(component)
        (probe,) = islice(self.probes.read(component), 1)
        folder = self.folder(f"{component} points")
        codes = quantized_weights(source, plan, self.run)
        with TorchSession(TorchModel(source, SIZE, plan, codes)) as session:
            save_points(session, probe.feeds, events, {point.index for point in points}, folder)
        return Truth(StoredWeights(source, plan, codes), points, folder, probe.feeds)

    def look_into(self, model: TargetModel, plan: str, *, carried: bool = False) -> ComponentLayers:
        """Every module fed with PyTorch's inputs; with `carried`, also what comes together along a run."""
        truth = self.truth(model.component, plan)
        target = get_target(model.target)
        assert isinstance(target, Tapped)
        wiring = self.wiring(model.target, model.component, plan)
        inputs = native_feeds(truth.feeds, model.inputs, self.time)
        taps = taps_of(wiring, truth.points)
        at = {tensor: point.index for tensor, point in taps.items()}
        size = {tensor: point.bytes for tensor, point in taps.items()}
        segments = segments_of(wiring, taps, inputs)
        pieces = [
            piece for piece in pieces_of(segments, size, streamed=wiring.streamed) if carried or not piece.carried
        ]
        reference = read_points(truth.folder)
        with target.open_taps(model, threads=1) as session:
            subject = Subject(session, inputs, at, wiring.batchless, wiring.flat, reshaped(wiring, taps))
            found = examine(subject, pieces, reference=reference, full=None, own=self.folder("own"))
            layers, runs = layers_of(segments, [found]), session.partial_runs
        return ComponentLayers(model.component, model.precision, "", layers, (), 95.0, runs, 0.0)

    def damaged(self, target: str, plan: str, fault: Fault) -> TargetModel:
        """A copy of a model with a fault in it."""
        model = self.model(target, fault.component, plan)
        folder = self.folder(target)
        for file in model.files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model.folder / file, folder / file)
        copy = replace(model, folder=folder)
        plant(fault, copy, self.truth(fault.component, plan).stored, self.wiring(target, fault.component, plan))
        return copy


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Checkpoint, cache: Path) -> Laboratory:
    store = Cache(cache)
    store.prepare()
    return Laboratory(tmp_path_factory.mktemp("laboratory"), demo_checkpoint, store)


def test_the_true_module_of_a_planted_fault_is_named_first(
    laboratory: Laboratory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(FAULTS) == 50 + 27
    others, missed = [], []
    for target, plan, fault in FAULTS:
        damaged = laboratory.damaged(target, plan, fault)
        named = [layer.module for layer in laboratory.look_into(damaged, plan).bad]
        shutil.rmtree(damaged.folder)
        if not set(named[:1]) & guilty(fault):
            others.append(f"{target}: {fault}: {named[:3]}")
        if not set(named[:3]) & guilty(fault):
            missed.append(f"{target}: {fault}: {named[:3]}")
    count = len(FAULTS)
    with capsys.disabled():
        sys.stdout.write(f"\n{count - len(others)} of {count} named first, {count - len(missed)} in the top three\n")
    assert not missed
    assert len(others) <= 0.04 * count, others


@pytest.mark.parametrize("target", TARGETS)
def test_a_sound_model_names_no_module(laboratory: Laboratory, target: str) -> None:
    for part, plan in (*((part, "fp16") for part in PARTS), ("unet", "codes")):
        found = laboratory.look_into(laboratory.model(target, part, plan), plan, carried=True)
        points = laboratory.truth(part, plan).points
        assert found.bad == (), found.bad
        assert found.left is None
        # ncnn has no names for some tensors between two operations without weights
        assert len({layer.point for layer in found.layers}) > 0.8 * len(points)
        assert found.partial_runs <= 25


def test_validate_names_the_module_of_a_damaged_bundle_and_its_page_shows_it_beside_a_sound_one(
    command: Command, laboratory: Laboratory, converted: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(converted / "ncnn", tmp_path / "ncnn"))
    fault = Fault("scaled weight", "text_encoder", f"{LAYER}.mlp.fc1")
    stored = laboratory.truth("text_encoder", "fp16").stored
    plant(fault, open_bundle(bundle).model("text_encoder"), stored, Wiring((), {}))
    rewrite_hashes(bundle)
    page = tmp_path / "layers.html"

    words = ("--layers", "--no-image", "--no-speed", "--html", page, "--beside", converted / "mnn", "--json")
    answer = command("validate", bundle, *words)
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

    text = page.read_text()
    assert f"computes something other than PyTorch: text_encoder/{fault.module}." in text
    assert re.findall(r'role="columnheader"[^>]*>([^<]+)<', text) == ["module", "ncnn", "mnn"]
    row = re.search(rf'>text_encoder/{re.escape(fault.module)}</div>(?:<div class="cell"[^>]*>([^<]+)</div>)+', text)
    assert row
    damaged, sound = (float(cell) for cell in re.findall(r'role="cell"[^>]*>([^<]+)<', row[0]))
    assert damaged == pytest.approx(20, abs=1)
    assert sound > 110
    if chromium():
        seen = visit(page, tmp_path, width=390)
        assert (seen.console, seen.requests) == ((), ())
        assert seen.overflow <= 0
