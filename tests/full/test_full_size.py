"""What only full size shows: Stable Diffusion 1.5 shapes within the machine, and the demo's oracle over 64 prompts.

Minutes and gigabytes each; `make test-full` runs them. A ready checkpoint can be named with DIFFUSETTE_SD15.
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


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with SD1.5's shapes and random weights."""
    ready = os.environ.get("DIFFUSETTE_SD15")
    if ready:
        return Path(ready)
    folder = tmp_path_factory.mktemp("sd15") / "sd15"
    subprocess.run([sys.executable, "-P", ROOT / "benchmarks" / "make_checkpoint.py", "sd15", folder], check=True)
    return folder


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_sd15_converts_to_green_gates_within_memory(
    sd15: Path, cache: Path, tmp_path: Path, target: str, precision: str
) -> None:
    code, report = diffusette(
        "convert", sd15, "-o", tmp_path / "out", "--target", target, "--precision", precision, cache=cache
    )
    assert code == 0, report
    assert report["peak_mib"] <= 10_000
    for stage in report["stages"]:
        measured = stage.get("measured", {})
        if stage["stage"].endswith(("export", "pnnx", "simplify", "weights fp16", "weights fp32")):
            assert measured.get("own_peak_mib", 0) <= 1500, stage
        if "gate" in stage["stage"] or "reference" in stage["stage"]:
            assert measured.get("own_peak_mib", stage.get("tree_peak_mib", 0)) <= 5500, stage
    code, verdict = diffusette("verify", tmp_path / "out", cache=cache)
    assert (code, verdict["ok"]) == (0, True)


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
