"""What stages took is looked up after a conversion, and held against the forecast."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from diffusette.convert.forecast import Forecast, StageForecast
from diffusette.convert.ledger import Compared, Ledger, Taken, compared
from diffusette.stages.cache import Cache
from diffusette.stages.stage import Stage


@dataclass(frozen=True)
class Artifact:
    digest: str


@dataclass(frozen=True)
class Gate(Stage[Artifact], name="gate", version=1, tools=()):
    """A stage as the gates are: its name alone does not tell which target it is of."""

    precision: str
    component: str = "unet"
    runtime: str = "ncnn"

    def key(self) -> dict[str, object]:
        return {}

    def run(self, into: Path) -> Artifact:
        raise AssertionError("the runner of these tests runs nothing")


def ledger(root: Path, measured: list[dict[str, Any]]) -> Ledger:
    """A ledger whose runner answers, in turn, with artifacts that took what `measured` says."""
    cache = Cache(root)
    digests = [f"{number:064x}" for number in range(len(measured))]
    for digest, found in zip(digests, measured, strict=True):
        folder = cache.folder(digest)
        folder.mkdir(parents=True)
        files = {"a": {"bytes": 30, "sha256": ""}, "b": {"bytes": 12, "sha256": ""}}
        (folder / "artifact.json").write_text(json.dumps({"measured": found, "files": files}))
    coming = iter(digests)
    run: Any = lambda stage: Artifact(next(coming))  # noqa: E731
    return Ledger(run, cache)


def test_of_stages_with_one_name_the_most_counts(tmp_path: Path) -> None:
    run = ledger(
        tmp_path,
        [
            {"own_peak_mib": 900, "stage_peak_mib": 1000, "tree_peak_mib": 1100, "seconds": 9.0, "cpu_seconds": 3.0},
            {"own_peak_mib": 1200, "stage_peak_mib": 800, "tree_peak_mib": 900, "seconds": 8.0, "cpu_seconds": 2.0},
        ],
    )
    run(Gate("fp16"))
    run(Gate("fp32"))
    assert run.taken() == {"unet gate ncnn": Taken(1200, 42, 3.0)}
    assert run.run_mib("ncnn") == {"unet": 1200}
    assert run.run_mib("ort") == {}


def test_an_object_of_an_older_version_tells_its_own_peak(tmp_path: Path) -> None:
    run = ledger(tmp_path, [{"own_peak_mib": 900, "tree_peak_mib": 1000, "seconds": 3.0}])
    run(Gate("fp16"))
    assert run.taken()["unet gate ncnn"].peak_mib == 900


SEEN = Compared("unet export", 1000, 1000, 10**9, 10**9)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (SEEN, []),
        (replace(SEEN, measured_mib=1240), []),
        (replace(SEEN, measured_mib=1260), ["unet export: 1260 MiB of memory, forecast 1000 MiB"]),
        (replace(SEEN, measured_mib=820), ["unet export: 820 MiB of memory, forecast 1000 MiB"]),
        (replace(SEEN, forecast_mib=100, measured_mib=60), []),  # what an interpreter takes differs so much
        (replace(SEEN, measured_bytes=2 * 10**9), ["unet export: 2000 MB of disk, forecast 1000 MB"]),
    ],
)
def test_more_than_a_fifth_beside_the_forecast_is_told_with_both_figures(stage: Compared, words: list[str]) -> None:
    assert list(stage.misses()) == words


def test_only_stages_that_ran_and_were_forecast_from_measurements_are_compared() -> None:
    told = Forecast(
        (
            StageForecast("unet export", 500, 1.0),
            StageForecast("unet gate ncnn", 5000, 1.0, fitted=False),
            StageForecast("unet mnn", 700, 1.0),
        ),
        0,
        0,
    )
    found = compared(told, {"unet export": Taken(600, 5, 1.0), "unet gate ncnn": Taken(1, 1, 1.0)})
    assert found == (Compared("unet export", 500, 600, 0, 5, 1.0),)


def test_what_was_compared_is_found_again_by_the_manifest(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.remember_memory("0" * 64, [SEEN.to_json()])
    assert cache.find_memory("0" * 64) == [SEEN.to_json()]
    assert cache.find_memory("1" * 64) == []
