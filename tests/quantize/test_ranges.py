"""Ranges of activations from streamed values: as if all had been kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusette.export import contract, modules
from diffusette.pipeline.artifacts import Checkpoint
from diffusette.quantize.ranges import Histogram, ObserveInputs
from diffusette.quantize.samples import Samples


def streamed(values: np.ndarray, parts: int) -> Histogram:
    found = Histogram()
    for part in np.array_split(values, parts):
        found.add(part)
    return found


def test_extremes_are_exact_and_every_value_is_counted_however_the_span_grows() -> None:
    values = np.sort(np.random.default_rng(0).standard_normal(10_000).astype(np.float32)) * 50  # each part is larger
    found = streamed(values, 40)
    assert found.counts.sum() == len(values)
    assert found.range("minmax") == (float(values.min()), float(values.max()))


def test_percentile_matches_that_of_all_values_within_two_bins() -> None:
    values = np.random.default_rng(1).standard_normal(200_000).astype(np.float32)
    found = streamed(values, 7)
    expected = np.percentile(values, [0.005, 99.995])
    assert found.range("percentile") == pytest.approx(tuple(expected), abs=2 * 2 * found.span / 2048)


def test_mse_clips_a_lone_outlier_and_nothing_of_a_uniform_range() -> None:
    chance = np.random.default_rng(2)
    spiked = np.append(chance.standard_normal(500_000), 100.0).astype(np.float32)
    low, high = streamed(spiked, 3).range("mse")
    assert 20 <= high < 70
    assert low <= 0
    flat = chance.uniform(0, 10, 100_000).astype(np.float32)
    assert streamed(flat, 3).range("mse")[1] > 9.7


def test_zero_is_always_representable() -> None:
    for method in ("minmax", "percentile", "mse"):
        low, high = streamed(np.linspace(3, 4, 100, dtype=np.float32), 2).range(method)
        assert low == 0.0
        assert high > 3
        assert streamed(np.zeros(10, np.float32), 2).range(method) == (0.0, 0.0)


def test_every_layer_has_a_range_for_each_timestep(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, chance = tiny_checkpoint.components["unet"], np.random.default_rng(0)
    times = (900.0, 500.0, 1.0)
    for index, t in enumerate(times):
        feeds = {
            f"feed.{spec.name}": chance.standard_normal(spec.shape).astype(np.float32) * (1 + index)
            for spec in contract.input_specs(source, (64, 64))
        }
        feeds["feed.timestep"] = np.array(t, np.float32)
        np.savez(tmp_path / f"unet-{index:03}.npz", **feeds)
    into = tmp_path / "out"
    into.mkdir()
    found = ObserveInputs(source, Samples((tmp_path,), ("0" * 64,))).run(into)
    found = replace(found, folder=into)
    ranges, steps = found.read("minmax"), found.by_timestep()
    names = {name.removesuffix(".weight") for name, p in modules.build(source).named_parameters() if p.dim() > 1}
    assert set(ranges) == names == set(steps)
    assert set(steps["conv_in"]) == set(times)
    assert ranges["conv_in"][1] == max(high for _, high in steps["conv_in"].values())
    assert steps["conv_in"][1.0][1] > steps["conv_in"][900.0][1]
