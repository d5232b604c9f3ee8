"""Golden vectors from `convert --goldens` to `check-goldens`, on every runtime."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.weights import Weights

from .conftest import TARGETS, Command
from .test_demo import rewrite_hashes, scale_tensor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def with_goldens(tmp_path_factory: pytest.TempPathFactory, cache: Path, converted: Path) -> Path:
    """The demo's bundles with goldens; `converted` has built all of their models."""
    from diffusette.convert.convert import convert_checkpoint
    from diffusette.stages.cache import Cache

    folder = tmp_path_factory.mktemp("goldens") / "demo"
    assert convert_checkpoint("demo", folder, targets=TARGETS, precision="fp16", goldens=True, cache=Cache(cache)).ok
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_a_bundle_replays_its_own_goldens(command: Command, with_goldens: Path, target: str) -> None:
    answer = command("check-goldens", with_goldens / target, "--json")
    assert answer.code == 0, answer.err
    facts = answer.json
    assert facts["ok"] is True
    assert facts["made_by"].startswith(target)
    port = [check for check in facts["checks"] if check["golden_answers"]]
    time = "timestep" if target == "ort" else "timestep_embedding"
    assert [check["what"] for check in port] == [
        "start at strength 0.5", "sample", time, "latents", "latent_sample", "pixels", "bytes"
    ]  # fmt: skip
    assert {check["found"] for check in port} == {0, 999.0}, "it is this very code that made them"
    models = [check for check in facts["checks"][2:] if not check["golden_answers"]]
    assert len(models) == 2 + 2 + 20 + 1
    assert [check["what"] for check in models][:2] == ["picture encoded", "start at strength 0.5"]
    assert min(check["found"] for check in models if check["unit"] == "dB SNR") > 110
    assert (facts["machine"], set(facts["arithmetics"].values())) == ("here", {"float32"})
    assert (with_goldens / target / "goldens" / "goldens.json").stat().st_size < 300_000
    assert command("verify", with_goldens / target).code == 0


def test_the_recipe_that_was_used_gives_the_same_bundle_again(
    command: Command, with_goldens: Path, tmp_path: Path
) -> None:
    bundle = with_goldens / "mnn"
    recipe = tmp_path / "again.toml"
    recipe.write_text(json.loads((bundle / "manifest.json").read_text())["recipe"])
    answer = command("convert", "demo", "-o", tmp_path / "again", "-r", recipe, "--target", "mnn", "--json")
    assert answer.code == 0, answer.err
    assert all(stage.get("cached") for stage in answer.json["stages"])
    goldens = [place / "goldens" / "goldens.json" for place in (bundle, tmp_path / "again")]
    assert goldens[0].read_bytes() == goldens[1].read_bytes()


def test_drift_is_five_damage_is_six_and_none_is_two(
    command: Command, with_goldens: Path, converted: Path, tmp_path: Path
) -> None:
    assert command("check-goldens", converted / "mnn").code == 2
    drifted = Path(shutil.copytree(with_goldens / "mnn", tmp_path / "drifted"))
    weight = Weights(open_checkpoint("demo").components["unet"]).read("mid_block.resnets.0.conv1.weight")
    scale_tensor(drifted / "unet", weight.astype(np.float16))
    assert command("check-goldens", drifted).code == 6
    rewrite_hashes(drifted)
    answer = command("check-goldens", drifted)
    assert answer.code == 5
    assert "latents after step" in answer.out.splitlines()[-1]
    encoder = Path(shutil.copytree(with_goldens / "ort", tmp_path / "encoder"))
    weight = Weights(open_checkpoint("demo").components["vae_encoder"]).read("encoder.conv_in.weight")
    scale_tensor(encoder / "vae_encoder", weight.astype(np.float16))
    rewrite_hashes(encoder)
    answer = command("check-goldens", encoder)
    assert answer.code == 5
    assert answer.out.splitlines()[-1].endswith("picture encoded first")
    goldens = drifted / "goldens" / "goldens.json"
    goldens.write_text(goldens.read_text().replace('"schema":2', '"schema":9'))
    rewrite_hashes(drifted)
    assert command("check-goldens", drifted).code == 6


def test_an_arithmetic_is_named_and_has_its_own_limits(command: Command, with_goldens: Path) -> None:
    answer = command("check-goldens", with_goldens / "ncnn", "--arithmetic", "bf16", "--json")
    assert answer.code == 0, answer.err
    assert set(answer.json["arithmetics"].values()) == {"bf16"}
    steps = [check for check in answer.json["checks"] if check["what"].startswith("latents after")]
    assert all(check["limit"] < 40 < check["found"] < 60 for check in steps[:1])
    shown = command("check-goldens", with_goldens / "ncnn", "--arithmetic", "bf16")
    assert shown.out.splitlines()[-1].endswith("replayed in bf16 here: all hold")


def test_an_unknown_arithmetic_or_machine_is_two_and_lists_those_there_are(
    command: Command, with_goldens: Path
) -> None:
    answer = command("check-goldens", with_goldens / "ort", "--arithmetic", "double")
    assert (answer.code, "bf16-matmul, float32" in answer.err) == (2, True)
    answer = command("check-goldens", with_goldens / "ort", "--machine", "mips")
    assert (answer.code, "arm64:cortex-a76" in answer.err) == (2, True)
