"""The main job, as a user does it: convert, validate, profile, generate, verify, on every runtime."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusette.bundle.bundle import open_bundle
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.weights import Weights
from diffusette.stages.cache import Cache
from diffusette.stages.hashing import sha256_of_file
from diffusette.stages.progress import Silent
from diffusette.validate.speed.measure import measure_bundles
from PIL import Image

from .conftest import TARGETS, Command

pytestmark = pytest.mark.slow

PROMPT = "a large red star in the center, on a blue background"
COMPONENTS = {"text_encoder", "unet", "vae_decoder", "vae_encoder"}


@pytest.fixture
def bundle_copy(converted: Path, tmp_path: Path) -> Path:
    """All three bundles, to be damaged."""
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def test_a_second_convert_runs_no_stage_and_touches_nothing(command: Command, converted: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in converted.rglob("*")}
    words = [word for name in TARGETS for word in ("--target", name)]
    answer = command("convert", "demo", "-o", converted, *words, "--precision", "fp16", "--json")
    assert answer.code == 0, answer.err
    assert all(stage.get("cached") for stage in answer.json["stages"])
    assert {file: file.stat().st_mtime_ns for file in converted.rglob("*")} == before
    assert [row["gate"] for row in answer.json["bundles"]] == ["passed"] * 3
    taken = {row["stage"]: row["memory_mib"] for row in answer.json["compared"]}
    assert {f"{part} gate {target}" for part in COMPONENTS for target in TARGETS} <= taken.keys()
    assert all(row["measured"] > 20 for row in taken.values())
    assert all(answer.json["taken"][stage]["memory_mib"] == row["measured"] for stage, row in taken.items())


@pytest.mark.parametrize("target", TARGETS)
def test_validate_passes_and_says_by_how_much(command: Command, converted: Path, target: str) -> None:
    answer = command("validate", converted / target, "--json")
    assert answer.code == 0, answer.err
    report = answer.json
    assert report["ok"] is True
    assert set(report["components"]) == COMPONENTS
    for part in report["components"].values():
        assert part["ok"]
        assert 45 <= part["snr_db"] < 110  # fp16 weights: neither broken nor, by mistake, fp32
        assert part["fidelity"]["snr_db"] >= part["fidelity"]["tolerance"]
    assert report["image"]["psnr_db"] >= 55
    assert report["image"]["ssim"] > 0.999


@pytest.fixture(scope="module")
def measured(converted: Path, cache: Path) -> dict[str, Any]:
    """What `profile --vs torch` says of each bundle; PyTorch is loaded once for all three, as by `demo`."""
    bundles = [open_bundle(converted / name) for name in TARGETS]
    reports = measure_bundles(bundles, runs=2, versus_torch=True, cache=Cache(cache), progress=Silent())
    return {name: report.to_json() for name, report in zip(TARGETS, reports, strict=True)}


def check_times(components: dict[str, Any]) -> None:
    assert set(components) == COMPONENTS
    for part in components.values():
        assert part["median_ms"] > 0
        assert part["p90_ms"] >= part["median_ms"]
        assert part["ratio_to_torch"] == pytest.approx(part["median_ms"] / part["torch"]["median_ms"], rel=0.01)
        assert 20 < part["peak_rss_mib"] < part["torch"]["peak_rss_mib"]
        assert part["disk_bytes"] > 100_000


@pytest.mark.parametrize("target", TARGETS)
def test_every_component_is_measured_next_to_torch(measured: dict[str, Any], target: str) -> None:
    check_times(measured[target]["components"])


@pytest.mark.parametrize(("target", "more"), [("ort", ("--vs", "torch")), ("ncnn", ()), ("mnn", ())])
def test_profile_times_components_and_their_operations(
    command: Command, converted: Path, target: str, more: tuple[str, ...]
) -> None:
    answer = command("profile", converted / target, "--runs", 2, *more, "--ops", "--json")
    assert answer.code == 0, answer.err
    assert set(answer.json["ops"]) == COMPONENTS
    for part in answer.json["ops"].values():
        assert sum(kind["share"] for kind in part["kinds"]) == pytest.approx(1, abs=0.01)
        assert any(op["module"] for op in part["slowest"]), "the checkpoint is known here"
    if more:
        check_times(answer.json["components"])
    else:
        assert set(answer.json["components"]) == COMPONENTS
        assert all(part["median_ms"] > 0 and part["torch"] is None for part in answer.json["components"].values())


@pytest.mark.parametrize("target", TARGETS)
def test_generate_draws_the_same_picture_on_every_runtime(
    command: Command, converted: Path, target: str, tmp_path: Path
) -> None:
    answer = command("generate", converted / target, PROMPT, "-o", tmp_path / "a.png", "--seed", 7, "--json")
    again = command("generate", converted / target, PROMPT, "-o", tmp_path / "b.png", "--seed", 7, "--json")
    assert answer.code == again.code == 0, answer.err
    assert answer.json["sha256_of_float_image"] == again.json["sha256_of_float_image"]
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (64, 64, 3)
    red, blue = pixels[32, 32].astype(int), pixels[3, 3].astype(int)
    assert red[0] > red[2] + 60
    assert blue[2] > blue[0] + 60


@pytest.mark.parametrize("target", TARGETS)
def test_verify_and_validate_notice_one_flipped_byte(command: Command, bundle_copy: Path, target: str) -> None:
    bundle = bundle_copy / target
    assert command("verify", bundle).code == 0
    manifest = json.loads((bundle / "manifest.json").read_text())
    file = bundle / manifest["components"]["unet"]["files"][-1]["path"]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for words in (("verify", bundle), ("validate", bundle), ("generate", bundle, PROMPT), ("profile", bundle)):
        answer = command(*words)
        assert answer.code == 6, words
        assert file.name in answer.err


def scale_tensor(folder: Path, tensor: np.ndarray) -> Path:
    """Multiply a float16 weight by 1.1 wherever in `folder` its bytes lie; return the file."""
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        place = content.find(tensor.tobytes())
        if place >= 0:
            changed = (tensor.astype(np.float32) * 1.1).astype(np.float16).tobytes()
            file.write_bytes(content[:place] + changed + content[place + len(changed) :])
            return file
    raise AssertionError(f"the weight is in no file of {folder}")


def rewrite_hashes(bundle: Path) -> None:
    """Make the manifest agree with what lies there, as somebody who hides a change would."""
    manifest = json.loads((bundle / "manifest.json").read_text())

    def visit(node: object) -> None:
        if isinstance(node, dict):
            if {"path", "sha256", "bytes"} <= node.keys():
                node["sha256"] = sha256_of_file(bundle / node["path"])
                node["bytes"] = (bundle / node["path"]).stat().st_size
            for value in node.values():
                visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    visit(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("component", "weight"),
    [("unet", "mid_block.resnets.0.conv1.weight"), ("vae_decoder", "decoder.conv_in.weight")],
)
def test_validate_names_the_component_whose_weight_was_tampered_with(
    command: Command, bundle_copy: Path, target: str, component: str, weight: str
) -> None:
    bundle = bundle_copy / target
    tensor = Weights(open_checkpoint("demo").components[component]).read(weight).astype(np.float16)
    scale_tensor(bundle / component, tensor)
    rewrite_hashes(bundle)
    assert command("verify", bundle).code == 0
    answer = command("validate", bundle, "--json", "--no-image")
    assert answer.code == 5, answer.err
    verdicts = {name: part["ok"] for name, part in answer.json["components"].items()}
    assert verdicts == {name: name != component for name in COMPONENTS}
    assert next(iter(answer.json["components"])) == component  # the worst first
    assert answer.json["failures"][0].startswith(component)


def test_what_the_gates_took_enters_the_manifest_on_request_only(
    command: Command, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = json.loads((converted / "ncnn" / "manifest.json").read_text())
    assert set(plain["memory"]["forecast"]) == COMPONENTS
    assert plain["memory"]["measured"] == {}
    words = ("--target", "ncnn", "--precision", "fp16", "--record-memory")
    monkeypatch.setattr("diffusette.convert.ledger.TOLERANCE", 0.0)
    monkeypatch.setattr("diffusette.convert.ledger._NO_MATTER_MIB", 0.0)
    answer = command("convert", "demo", "-o", tmp_path / "b", *words)
    assert answer.code == 0, answer.err
    assert "warning: the forecast was wrong by more than 20 %: unet pnnx: " in answer.err
    told = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert set(told["memory"].pop("measured")) == COMPONENTS
    del plain["memory"]["measured"]
    assert told["memory"] == plain["memory"]
    assert command("verify", tmp_path / "b").code == 0


def test_inspect_tells_checkpoint_bundle_and_graph_apart(command: Command, converted: Path) -> None:
    checkpoint = command("inspect", "demo", "--json").json
    assert checkpoint["kind"] == "checkpoint"
    assert checkpoint["family"] == "sd1"
    assert checkpoint["components"]["unet"]["parameters"] == 3_372_484
    assert checkpoint["forecast"]["peak_mib"] > 100
    bundle = command("inspect", converted / "ncnn", "--json").json
    assert (bundle["kind"], bundle["target"]["name"]) == ("bundle", "ncnn")
    assert "unet pnnx" in [stage["stage"] for stage in bundle["conversion"]]
    assert "timestep_embedding" in [tensor["name"] for tensor in bundle["components"]["unet"]["inputs"]]
    graph = command("inspect", converted / "ort" / "unet" / "model.onnx", "--json").json
    assert (graph["kind"], graph["opset"]) == ("onnx", 18)
    assert [tensor["name"] for tensor in graph["inputs"]] == ["sample", "timestep", "encoder_hidden_states"]


def test_tables_for_people_show_the_same_as_json(command: Command, converted: Path) -> None:
    assert "converting it to ort, ncnn, mnn at fp16 needs about" in command("inspect", "demo").out
    bundle = command("inspect", converted / "mnn").out
    assert "parity gate: passed" in bundle
    assert "variant base (no sign of distillation)" in bundle
    assert "prediction epsilon, timesteps leading, 20 steps, guidance cfg 4" in bundle
    assert "opset 18" in command("inspect", converted / "ort" / "unet" / "model.onnx").out
    targets = command("targets").out
    assert all(name in targets for name in TARGETS)
    assert "demo" in command("recipe", "list").out
    assert "schema = 1" in command("recipe", "show", "sd1-fp16").out
    assert command("recipe", "check", "sd1-fp32").code == 0
    assert "unet export" in command("cache", "ls").out
    assert command("cache", "verify").code == 0


def test_the_ort_bundle_has_the_mobile_form_and_runs_it(command: Command, converted: Path) -> None:
    answer = command("profile", converted / "ort", "--runs", 1, "--form", "ort", "--json")
    assert answer.code == 0, answer.err
    config = next((converted / "ort" / "unet").glob("required_operators*.config")).read_text()
    assert "ai.onnx;" in config
    assert str(converted) not in config


def test_nothing_in_a_bundle_tells_where_it_was_made(converted: Path, cache: Path) -> None:
    for file in converted.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            for path in (str(cache), str(converted), str(Path.home()) + "/"):
                assert path.encode() not in content, f"{file.name} holds {path}"


@pytest.mark.slow
def test_auto_says_what_it_took_and_why_and_writes_down_the_race(command: Command, tmp_path: Path) -> None:
    words = ("convert", "demo", "-o", tmp_path / "out", "--target", "ort", "--precision", "auto")
    answer = command(*words, "--json")
    assert answer.code == 0, answer.err
    assert "auto: ort" in answer.err
    facts = json.loads((tmp_path / "out/manifest.json").read_text())
    taken = facts["components"]["unet"]["precision"]
    assert f'precision = "{taken}"' in facts["recipe"]
    if taken != "fp32":
        assert facts["speed"]["unet"]["ratio_to_fp32"] < 2
        assert set(facts["speed"]) == set(facts["components"])
    shares = facts["components"]["unet"]["schemes"]
    assert sum(entry["share"] for entry in shares.values()) == pytest.approx(1)
    again = command(*words)
    assert again.code == 0, again.err
