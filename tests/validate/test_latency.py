"""Profiles: the models take turns, warm-up does not count, figures come from the sessions' own processes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from diffusette.runtimes.protocol import Array, Closing, Feeds
from diffusette.stages.artifacts import TensorSpec
from diffusette.stages.errors import BundleError, UsageError
from diffusette.validate.speed.latency import Contestant, Entrant, ProfileReport, profile_component, profile_table
from diffusette.validate.speed.memory import bytes_on_disk
from rich.console import Console

FEEDS = {"x": np.zeros(1, np.float32)}


class Clocked(Closing):
    """A session that takes the seconds it is told to, and writes down when it ran."""

    inputs = (TensorSpec("x", "float32", (1,)),)
    outputs = (TensorSpec("y", "float32", (1,)),)

    def __init__(self, name: str, seconds: list[float], diary: list[str]) -> None:
        self.name, self.seconds, self.diary = name, iter(seconds), diary
        self.load_seconds, self.last_seconds, self.last_waited, self.peak_rss_mib = 0.25, 0.0, 0.0, 100.0

    def run(self, feeds: Feeds) -> dict[str, Array]:
        self.diary.append(self.name)
        self.last_seconds = next(self.seconds)
        self.peak_rss_mib += 10
        return {"y": feeds["x"]}

    def close(self) -> None:
        self.diary.append(f"close {self.name}")


def contestant(name: str, seconds: list[float], diary: list[str]) -> Contestant:
    return Contestant(lambda: Clocked(name, seconds, diary), lambda _: FEEDS)


def test_models_take_turns_and_warm_up_does_not_count() -> None:
    diary: list[str] = []
    (profile,) = profile_component(
        "unet",
        [Entrant("fp16", contestant("A", [9.0, 0.01, 0.02, 0.03], diary), 2**20)],
        threads=2,
        runs=3,
        warmup=1,
        torch=contestant("B", [9.0, 0.04, 0.04, 0.04], diary),
    )
    assert diary == ["A", "B"] * 4 + ["close B", "close A"]
    assert profile.timing.median_ms == pytest.approx(20)
    assert profile.timing.p90_ms == pytest.approx(28)
    assert profile.ratio == pytest.approx(0.5)
    assert (profile.timing.memory.loaded_mib, profile.timing.memory.peak_mib) == (100, 140)
    assert profile.timing.load_s == 0.25


def test_bundles_take_turns_and_share_one_pytorch() -> None:
    diary: list[str] = []
    entrants = [Entrant(name, contestant(name, [9, seconds], diary), 1) for name, seconds in (("A", 2), ("B", 3))]
    one, other = profile_component("unet", entrants, threads=1, runs=1, torch=contestant("torch", [9, 4], diary))
    assert diary == ["A", "B", "torch"] * 2 + ["close torch", "close B", "close A"]
    assert (one.precision, one.ratio, other.precision, other.ratio) == ("A", 0.5, "B", 0.75)


def test_without_torch_there_is_no_ratio() -> None:
    (profile,) = profile_component("unet", [Entrant("fp32", contestant("A", [1, 1], []), 1)], threads=1, runs=1)
    assert profile.ratio is None
    assert profile.to_json()["ratio_to_torch"] is None


def test_no_runs_measure_nothing() -> None:
    with pytest.raises(UsageError, match="0 runs"):
        profile_component("unet", [Entrant("fp32", contestant("A", [], []), 1)], threads=1, runs=0)


def test_json_and_table_say_how_it_was_measured() -> None:
    (profile,) = profile_component(
        "unet", [Entrant("fp32", contestant("A", [1, 0.5], []), 3 * 2**20)], threads=2, runs=1
    )
    report = ProfileReport("ort", (profile,), "a processor, 2 cores")
    facts = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert facts["components"]["unet"]["median_ms"] == 500
    assert facts["components"]["unet"]["threads"] == 2
    assert "own process" in facts["memory_definition"]
    assert "warm-up" in facts["method"]
    out = io.StringIO()
    Console(file=out, width=160).print(profile_table(report))
    assert "500.00" in out.getvalue()
    assert "3.00" in out.getvalue()
    assert "2 cores" in out.getvalue()


def test_a_shared_file_is_shipped_once(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"12345")
    assert bytes_on_disk([file, tmp_path / "." / "weights.bin"]) == 5
    with pytest.raises(BundleError, match=r"gone\.bin is missing"):
        bytes_on_disk([tmp_path / "gone.bin"])
