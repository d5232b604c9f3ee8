"""The UNet's error timestep by timestep: which calls, what is worst and best, what a page and a terminal say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest
from diffusette.stages.artifacts import TensorSpec
from diffusette.validate.pages.timestep_section import timestep_section
from diffusette.validate.parity import Parity
from diffusette.validate.reference.probes import ProbePlan, Probes, RoundedAnswers
from diffusette.validate.report import ComponentReport, ParityReport
from diffusette.validate.timesteps.activation_bits import activation_bits
from diffusette.validate.timesteps.curve import TimestepCurve, TimestepError, curve_plan, measure_timesteps
from diffusette.validate.tolerances import Tolerance

TIMES = (951.0, 501.0, 1.0)
SPEC = TensorSpec("sample", "float32", (1, 1, 2, 2))
TIMESTEP = TensorSpec("timestep", "float32", ())


class Off:
    """Answers the sample, off by a tenth of a thousandth for each timestep that is left."""

    inputs, outputs = (SPEC, TIMESTEP), (replace(SPEC, name="out_sample"),)

    def __init__(self, broken_at: float = math.nan) -> None:
        self.broken_at = broken_at

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        t = float(feeds["timestep"])
        value = feeds["sample"] * np.float32(1 + (1000 - t) * 1e-4)
        return {"out_sample": np.full_like(value, np.nan) if t == self.broken_at else value}

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, k: type[BaseException] | None, e: BaseException | None, t: TracebackType | None) -> None:
        pass


@pytest.fixture
def probes(tmp_path: Path) -> Probes:
    """Two prompts at three timesteps; PyTorch answers the sample itself."""
    labels: list[str] = []
    for prompt in "ab":
        for t in TIMES:
            sample = np.random.default_rng(int(t)).normal(size=SPEC.shape).astype(np.float32)
            feeds = {"feed.sample": sample, "feed.timestep": np.array(t, np.float32), "output.out_sample": sample}
            np.savez(tmp_path / f"unet-{len(labels):03}.npz", **feeds)
            labels.append(f"{prompt!r} (t = {t:g})")
    return Probes(tmp_path, ProbePlan(("a", "b"), steps=3), (16, 16), {"unet": tuple(labels)})


def test_every_call_counts_at_its_timestep(probes: Probes) -> None:
    curve = measure_timesteps(Off(), "unet", probes, None, {}, {1.0: 0.002})
    assert [point.timestep for point in curve.points] == list(TIMES)
    assert [len(point.calls_db) for point in curve.points] == [2, 2, 2]
    expected = [-20 * math.log10((1000 - t) * 1e-4) for t in TIMES]
    assert [point.snr_db for point in curve.points] == pytest.approx(expected, abs=0.05)
    assert (curve.worst.timestep, curve.best.timestep) == (1.0, 951.0)
    assert curve.points[-1].noise_share == 0.002
    assert curve.slope is not None
    assert curve.slope == pytest.approx(100 * np.polyfit(TIMES, expected, 1)[0], abs=0.02)
    assert curve.line.startswith("UNet by timestep: worst 20.0 dB at t = 1, best 46.2 dB at t = 951, +")
    assert curve.ok


def test_the_same_weights_are_told_apart_from_the_original_ones(probes: Probes, tmp_path: Path) -> None:
    folder = tmp_path / "rounded"
    folder.mkdir()
    for index, probe in enumerate(probes.read("unet")):
        np.savez(folder / f"{index:03}.npz", out_sample=probe.outputs["out_sample"] * np.float32(1.05))
    curve = measure_timesteps(Off(), "unet", probes, RoundedAnswers(folder, "unet", "w8c_afp", 6), {}, {})
    same = [point.least_same_weights_db for point in curve.points]
    assert same == pytest.approx([-20 * math.log10(abs((1000 - t) * 1e-4 / 1.05 - 0.05 / 1.05)) for t in TIMES], abs=1)
    assert "same weights" in curve.line


def test_a_runtime_that_breaks_at_one_timestep_fails_the_report(probes: Probes) -> None:
    curve = measure_timesteps(Off(broken_at=501.0), "unet", probes, None, {}, {})
    assert not curve.ok
    part = ComponentReport("unet", "fp32", Tolerance(40.0, ""), Parity(0.0, 90.0, 90.0, 1.0), "late", 3)
    report = ParityReport("ort", (part,), timesteps=curve)
    assert not report.ok
    assert "t = 501" in report.failures()[0]
    assert report.to_json()["timesteps"]["problem"]
    assert timestep_section(report.to_json()["timesteps"]) == []
    assert ParityReport("ort", (part,)).to_json()["timesteps"] is None


def test_the_curve_keeps_every_call_of_every_prompt_once() -> None:
    plan = ProbePlan(("a", "b", "c"), texts=("d",), steps=4, picked=((0, "conditional"),))
    dense = curve_plan(plan)
    assert dense.prompts == ("a", "b", "c"), "the gate's, so that both say the same of a timestep"
    assert len(dense.picked) == 8
    assert curve_plan(dense) is dense, "what keeps every call already is not asked again"
    seeds = curve_plan(replace(plan, prompts=("a", "a", "b")))
    assert seeds.prompts == ("a", "b")
    few = replace(plan, guidance_mode="none", picked=tuple((step, "conditional") for step in range(4)))
    assert curve_plan(few) is few, "a distilled model's gate keeps every call"


def test_json_and_page_say_the_same(probes: Probes) -> None:
    curve = measure_timesteps(Off(), "unet", probes, None, {}, {1.0: 0.002})
    bits = activation_bits({"conv_in": {951.0: (-1.0, 1.0), 1.0: (-0.25, 0.25)}}, None)
    facts = replace(curve, activations=bits).to_json()
    assert [point["timestep"] for point in facts["points"]] == list(TIMES)
    assert facts["worst_timestep"] == 1.0
    first, second = timestep_section(facts)
    assert "20.0 dB at t = 1 to 46.2 dB at t = 951" in first["words"]
    assert "At t = 1 noise is 0.2 % of the latent" in first["words"]
    assert "<title>The UNet&#x27;s error by timestep: 20.0 dB at timestep 1" in first["plot"]
    assert "same rounded weights" not in first["words"] + first["plot"]
    assert "least 6.0 (conv_in at t = 1)" in second["words"]


def test_a_curve_of_one_timestep_has_no_slope() -> None:
    curve = TimestepCurve("unet", (TimestepError(1.0, (math.inf,), ()),), 4)
    assert curve.slope is None
    assert curve.line == "UNet by timestep (1 of 4 steps): worst equal at t = 1, best equal at t = 1"
    assert curve.to_json()["points"][0]["snr_db"] == 999.0


def test_bits_are_counted_against_the_range_that_is_used() -> None:
    seen = {"a": {951.0: (-4.0, 4.0), 1.0: (0.5, 1.0)}, "b": {951.0: (0.0, 1.0), 1.0: (0.0, 1.0)}}
    dynamic = activation_bits(seen, None)
    assert dynamic
    assert dynamic.way == "dynamic"
    early, late = dynamic.points
    assert (early.median_bits, early.clipped) == (8.0, 0)
    assert (late.least_bits, late.least_layer) == (5.0, "a")  # 0..1 of -4..4: an eighth
    static = activation_bits(seen, {"a": (-2.0, 2.0), "b": (0.0, 2.0)})
    assert static
    assert static.way == "static"
    assert [point.clipped for point in static.points] == [1, 0]
    assert (static.points[0].least_bits, static.points[0].least_layer) == (7.0, "b")
    assert static.points[1].least_bits == 6.0
    assert activation_bits({}, None) is None
