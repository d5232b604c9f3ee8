"""`compare` and the pages, on real bundles: agreement, damage, and what cannot be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.weights import Weights

from .conftest import Command
from .test_demo import rewrite_hashes, scale_tensor

pytestmark = pytest.mark.slow

COMPONENTS = {"text_encoder", "unet", "vae_decoder", "vae_encoder"}


def edited(bundle: Path, place: Path, edit: Any) -> Path:
    """A copy of a bundle whose manifest says something else."""
    shutil.copytree(bundle, place)
    manifest = json.loads((place / "manifest.json").read_text())
    edit(manifest)
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place


def test_two_runtimes_agree_and_the_page_says_so(command: Command, converted: Path, tmp_path: Path) -> None:
    page = tmp_path / "two.html"
    answer = command("compare", converted / "ort", converted / "mnn", "--html", page, "--json")
    assert answer.code == 0, answer.err
    found = answer.json
    assert (found["ok"], found["gated"], found["failures"], found["remarks"]) == (True, True, [], [])
    assert set(found["components"]) == COMPONENTS
    for name, part in found["components"].items():
        assert part["snr_db"] > 95, name  # both hold the same rounded weights: only arithmetic is left
        assert part["tolerance"] == pytest.approx(82.6 if name == "vae_decoder" else 89.0, abs=0.1)
        times = found["speed"][name]
        assert times["ratio_b_to_a"] == pytest.approx(times["b"]["median_ms"] / times["a"]["median_ms"], rel=0.01)
    assert found["image"]["psnr_db"] > 90
    assert len(found["image"]["pictures"]) == 4
    assert {"what": "MNN version", "a": "-"}.items() <= next(
        row for row in found["differences"] if row["what"] == "MNN version"
    ).items()
    text = page.read_text()
    assert "<h1>ort and mnn agree to" in text
    assert text.count("<img src=") == 12


def test_a_bundle_equals_itself(command: Command, converted: Path) -> None:
    answer = command("compare", converted / "mnn", converted / "mnn", "--no-speed", "--json")
    assert answer.code == 0, answer.err
    assert all(part["snr_db"] == 999.0 for part in answer.json["components"].values())
    assert answer.json["image"]["psnr_db"] == 999.0
    assert answer.json["differences"] == []
    assert answer.json["speed"] == {}


def test_a_weight_that_is_ten_percent_off_tells_two_bundles_apart(
    command: Command, converted: Path, tmp_path: Path
) -> None:
    wrong = Path(shutil.copytree(converted / "mnn", tmp_path / "wrong"))
    tensor = Weights(open_checkpoint("demo").components["vae_decoder"]).read("decoder.conv_in.weight")
    scale_tensor(wrong / "vae_decoder", tensor.astype(np.float16))
    rewrite_hashes(wrong)
    answer = command("compare", converted / "ort", wrong, "--no-speed", "--no-image", "--json")
    assert answer.code == 5, answer.err
    assert answer.json["failures"][0].startswith("vae_decoder: ")
    assert {name: part["ok"] for name, part in answer.json["components"].items()} == {
        name: name != "vae_decoder" for name in COMPONENTS
    }


def test_other_checkpoints_are_compared_with_a_warning_and_other_sizes_refused(
    command: Command, converted: Path, tmp_path: Path
) -> None:
    def elsewhere(manifest: Any) -> None:
        manifest["provenance"]["checkpoint"] = "a" * 64

    def larger(manifest: Any) -> None:
        manifest["size"] = [128, 64]

    other = edited(converted / "mnn", tmp_path / "other", elsewhere)
    answer = command("compare", converted / "mnn", other, "--no-speed", "--no-image", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["gated"] is False
    assert "different checkpoints" in answer.json["remarks"][0]
    assert "different checkpoints" in answer.err
    large = edited(converted / "mnn", tmp_path / "large", larger)
    answer = command("compare", converted / "mnn", large)
    assert answer.code == 2
    assert "128 x 64" in answer.err


def test_validate_writes_a_page_with_what_it_measured(command: Command, converted: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    answer = command("validate", converted / "mnn", "--html", page)
    assert answer.code == 0, answer.err
    text = page.read_text()
    assert "<h1>demo on mnn computes what PyTorch computes: " in text
    assert text.count("<img src=") == 12
    assert text.count("PyTorch eager in float32 took turns with it") == 1
    assert str(page) in answer.out
    page.write_text("mine")
    assert command("validate", converted / "mnn", "--html", page).code == 2
    assert page.read_text() == "mine"
