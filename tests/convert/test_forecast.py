"""Forecasts fit the conversions that were measured, and refusals name both figures."""

from __future__ import annotations

import json
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusette.convert.costs import PARENT_MIB
from diffusette.convert.describe import describe
from diffusette.convert.forecast import Forecast, StageForecast, forecast, refuse_if_too_small
from diffusette.convert.ledger import Taken, compared
from diffusette.stages.artifacts import Checkpoint
from diffusette.stages.cache import Cache
from diffusette.stages.errors import NoRoom
from diffusette.stages.limits import memory_available_mib

from .shapes import ROOT, checkpoint

TARGETS = ("ort", "ncnn", "mnn")
RUNS: list[dict[str, Any]] = json.loads((ROOT / "docs" / "measured.json").read_text())


@pytest.fixture
def sd15() -> Checkpoint:
    return checkpoint("sd15")


def needed(peak_mib: float = 1.0, cache_bytes: int = 0, output_bytes: int = 0) -> Forecast:
    return Forecast((StageForecast("unet mnn", peak_mib - PARENT_MIB, 1.0),), cache_bytes, output_bytes)


@pytest.mark.parametrize(
    ("run", "stage"), [(run, stage) for run in RUNS for stage in run["stages"]],
    ids=[f"{run['shapes']}-{run['precision']}-{stage}" for run in RUNS for stage in run["stages"]],
)  # fmt: skip
def test_each_stage_that_was_measured_is_forecast_within_a_fifth(run: dict[str, Any], stage: str) -> None:
    # of a float16 checkpoint nothing is rounded to float16: that stage ran on float32 weights
    source = checkpoint(run["shapes"], "float32" if "rounded-reference" in stage else "float16")
    precisions = dict.fromkeys(source.components, run["precision"])
    told = forecast(source, TARGETS, precisions, tuple(run["size"]), gate=True)
    taken = {
        stage: Taken(run["stages"][stage]["mib"], run["stages"][stage]["bytes"], run["stages"][stage]["cpu_seconds"])
    }
    (found,) = compared(told, taken)
    assert list(found.misses()) == []


def test_the_largest_stage_is_told_with_the_process_that_starts_it(sd15: Checkpoint) -> None:
    told = forecast(sd15, TARGETS, dict.fromkeys(sd15.components, "fp16"), (512, 512), gate=True)
    assert told.peak_mib == max(stage.peak_mib for stage in told.stages) + PARENT_MIB
    assert told.run_mib("ort")["unet"] > told.run_mib("ort")["text_encoder"]


def test_larger_pictures_and_more_targets_need_more(sd15: Checkpoint) -> None:
    precisions = dict.fromkeys(sd15.components, "fp16")
    one = forecast(sd15, ["ort"], precisions, (512, 512), gate=True)
    large = forecast(sd15, ["ort"], precisions, (1024, 1024), gate=True)
    three = forecast(sd15, TARGETS, precisions, (512, 512), gate=True)
    assert one.peak_mib < large.peak_mib
    assert one.cache_bytes < three.cache_bytes
    assert one.output_bytes < three.output_bytes


def test_what_a_conversion_does_not_run_is_not_forecast(sd15: Checkpoint) -> None:
    told = forecast(sd15, ["ncnn"], dict.fromkeys(sd15.components, "fp32"), (512, 512), gate=False)
    assert {stage.label.partition(" ")[2] for stage in told.stages} == {"", "pnnx", "weights ncnn"}


def test_stages_of_integers_are_forecast_but_not_held_against_the_measurement(sd15: Checkpoint) -> None:
    told = forecast(sd15, ["ort"], dict.fromkeys(sd15.components, "w8c_afp"), (512, 512), gate=False)
    taken = {stage.label: Taken(10 * stage.peak_mib, 0, 1.0) for stage in told.stages}
    assert [stage.stage for stage in compared(told, taken)] == ["tokenizer", "schedules"]


def test_a_target_of_another_package_has_no_figures_and_is_no_error(
    sd15: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = forecast(sd15, ["theirs"], dict.fromkeys(sd15.components, "fp16"), (512, 512), gate=False)
    assert (told.peak_mib, told.stages) == (0.0, ())
    refuse_if_too_small(replace(told, output_bytes=0), tmp_path, tmp_path)
    monkeypatch.setattr("diffusette.runtimes.registry.get_target", lambda name: object())
    facts = describe("demo", targets=("theirs",), gate=False)
    assert facts["forecast"]["peak_mib"] == 0


def test_too_little_memory_is_refused_with_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusette.convert.forecast.memory_available_mib", lambda: 4000.0)
    with pytest.raises(NoRoom, match="unet mnn needs about 7465 MiB of memory, 4000 MiB are available") as caught:
        refuse_if_too_small(needed(peak_mib=7465), tmp_path, tmp_path)
    assert "--ignore-forecast" in caught.value.hint
    refuse_if_too_small(needed(peak_mib=3999), tmp_path, tmp_path)


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked, 5 GB are free."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage(10**10, 5 * 10**9, 5 * 10**9))


@pytest.mark.usefixtures("small_disk")
def test_too_little_disk_is_refused_with_both_figures(tmp_path: Path) -> None:
    with pytest.raises(NoRoom, match=r"about 6\.00 GB will be written .*, 5\.00 GB are free"):  # both on one disk
        refuse_if_too_small(needed(cache_bytes=4 * 10**9, output_bytes=2 * 10**9), tmp_path / "c", tmp_path / "out")


@pytest.mark.usefixtures("small_disk")
def test_what_the_cache_holds_already_needs_no_room(tmp_path: Path) -> None:
    folder = Cache(tmp_path).folder("0" * 64)
    folder.mkdir(parents=True)
    files = {"weights": {"bytes": 3 * 10**9, "sha256": "0" * 64}}
    record = {"stage": "weights", "facts": {}, "measured": {}, "files": files}
    (folder / "artifact.json").write_text(json.dumps(record))
    refuse_if_too_small(needed(cache_bytes=4 * 10**9, output_bytes=2 * 10**9), tmp_path, tmp_path)
    with pytest.raises(NoRoom, match=r"about 6\.00 GB"):  # never below what the output alone needs
        refuse_if_too_small(needed(cache_bytes=10**9, output_bytes=6 * 10**9), tmp_path, tmp_path)


def test_the_page_cache_of_a_cgroup_counts_as_available(tmp_path: Path) -> None:
    mib = 2**20
    for name, text in {
        "memory.max": f"{100 * mib}\n",
        "memory.current": f"{90 * mib}\n",
        "memory.stat": f"anon {20 * mib}\ninactive_file {50 * mib}\nactive_file {10 * mib}\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert memory_available_mib(tmp_path) == pytest.approx(70)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_available_mib(tmp_path) > 70


def test_weights_that_are_float16_already_are_not_asked_about_again() -> None:
    def asked(dtype: str, precision: str) -> bool:
        source = checkpoint("sd15", dtype)
        told = forecast(source, ("ort",), dict.fromkeys(source.components, precision), (512, 512), gate=True)
        return any("rounded-reference" in stage.label for stage in told.stages)

    assert asked("float32", "fp16")
    assert asked("float16", "w8c_afp")
    assert not asked("float16", "fp16")
    assert not asked("float32", "fp32")


@pytest.mark.parametrize(
    "wrong", [{"attention_head_dim": [None]}, {"block_out_channels": [None]}, {"down_block_types": [7]}]
)
def test_numbers_that_are_none_are_left_to_the_export_to_refuse(wrong: dict[str, Any]) -> None:
    source = checkpoint("sd15")
    unet = replace(source.components["unet"], config={**source.components["unet"].config, **wrong})
    odd = replace(source, components={**source.components, "unet": unet})
    assert forecast(odd, TARGETS, dict.fromkeys(odd.components, "fp16"), (512, 512), gate=True).stages
