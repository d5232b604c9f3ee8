"""What only full size shows: SD 1.5 and SDXL shapes within the machine, and the demo's oracle over 64 prompts.

Minutes and gigabytes each; `make test-full` runs them. Ready checkpoints can be named with DIFFUSETTE_SD15 and
DIFFUSETTE_SDXL, folders that benchmarks/make_checkpoint.py wrote.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
TARGETS = ("ort", "ncnn", "mnn")
# Stages that are ours alone: no native converter holds weights in them.
OURS = ("export", "simplify", "weights", "weights ncnn", "build-ort", "mnn-form", "mnn")


def diffusette(*words: object, cache: Path) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "diffusette", *map(str, words), "--json"],
        env={**os.environ, "DIFFUSETTE_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def shaped(kind: str, place: Path, *words: str) -> Path:
    """A diffusers folder with the shapes of `kind` and random weights; a ready one if the environment names it."""
    if ready := os.environ.get(f"DIFFUSETTE_{kind.upper()}"):
        return Path(ready)
    subprocess.run([sys.executable, "-P", ROOT / "benchmarks" / "make_checkpoint.py", kind, place, *words], check=True)
    return place


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shaped("sd15", tmp_path_factory.mktemp("sd15") / "sd15")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shaped("sdxl", tmp_path_factory.mktemp("sdxl") / "sdxl", "--fp16")


def memory(report: dict[str, Any]) -> dict[str, int]:
    """Peak of each stage's process and the programs that it started, MiB."""
    found = {row["stage"]: row["memory_mib"]["measured"] for row in report["compared"]}
    assert found, "nothing was compared with the forecast"
    return found


def forecast_misses(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Stages over 20 % beside their forecast, but for what an interpreter takes."""
    pairs = [(row, row["memory_mib"]) for row in report["compared"]]
    return [row for row, mib in pairs if abs(mib["forecast"] - mib["measured"]) > max(0.2 * mib["measured"], 64)]


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_sd15_converts_to_green_gates_within_memory(
    sd15: Path, cache: Path, tmp_path: Path, target: str, precision: str
) -> None:
    code, report = diffusette(
        "convert", sd15, "-o", tmp_path / "out", "--target", target, "--precision", precision, cache=cache
    )
    assert code == 0, report
    assert report["peak_mib"] <= 6000
    taken = memory(report)
    for stage in OURS:
        assert taken.get(f"unet {stage}", 0) <= 800, stage
    assert all(mib <= 5500 for mib in taken.values()), taken
    assert forecast_misses(report) == []
    code, verdict = diffusette("verify", tmp_path / "out", cache=cache)
    assert (code, verdict["ok"]) == (0, True)


@pytest.mark.parametrize("target", TARGETS)
def test_sdxl_converts_within_memory(sdxl: Path, cache: Path, tmp_path: Path, target: str) -> None:
    code, report = diffusette(
        "convert", sdxl, "-o", tmp_path / "out", "--target", target, "--precision", "fp16", "--no-gate", cache=cache
    )
    assert code == 0, report
    assert report["peak_mib"] <= 4500
    taken = memory(report)
    for stage in OURS:
        assert taken.get(f"unet {stage}", 0) <= 1200, stage
    assert forecast_misses(report) == []


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_oracle_sees_no_difference_from_pytorch_over_64_prompts(
    cache: Path, tmp_path: Path, target: str, precision: str
) -> None:
    place = tmp_path / "out"
    code, _ = diffusette("convert", "demo", "-o", place, "--target", target, "--precision", precision, cache=cache)
    assert code == 0
    code, report = diffusette("validate", place, "--image", "--prompts", 64, cache=cache)
    assert code == 0, report
    oracle = report["oracle"]
    assert abs(oracle["score"] - oracle["reference_score"]) <= 1
    assert oracle["reference_score"] > 90
