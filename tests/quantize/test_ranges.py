"""Ranges of activations from streamed values: as if all had been kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusette.checkpoints import network
from diffusette.export.contract import input_specs
from diffusette.quantize.histogram import BINS, Histogram
from diffusette.quantize.ranges import ObserveInputs, layer_ranges, merged_histograms
from diffusette.quantize.samples import Samples
from diffusette.stages.artifacts import Checkpoint
from diffusette.stages.errors import ModelError


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
    expected = np.percentile(values, [0.0005, 99.9995])
    assert found.range("percentile") == pytest.approx(tuple(expected), abs=2 * 2 * found.span / BINS)


def test_mse_clips_a_lone_outlier_and_nothing_of_a_uniform_range() -> None:
    chance = np.random.default_rng(2)
    spiked = np.append(chance.standard_normal(500_000), 100.0).astype(np.float32)
    low, high = streamed(spiked, 3).range("mse")
    assert 20 <= high < 70
    assert low <= 0
    flat = chance.uniform(0, 10, 100_000).astype(np.float32)
    assert streamed(flat, 3).range("mse")[1] > 9.7


def test_zero_is_always_representable() -> None:
    for method in ("minmax", "percentile", "mse", "entropy"):
        low, high = streamed(np.linspace(3, 4, 100, dtype=np.float32), 2).range(method)
        assert low == 0.0
        assert high > 3
        assert streamed(np.zeros(10, np.float32), 2).range(method) == (0.0, 0.0)


def test_entropy_clips_a_lone_outlier() -> None:
    spiked = np.append(np.random.default_rng(4).standard_normal(500_000), 100.0).astype(np.float32)
    low, high = streamed(spiked, 3).range("entropy")
    assert -10 < low < -2
    assert 2 < high < 90


def test_parts_add_up_to_what_one_would_have_counted() -> None:
    values = np.random.default_rng(3).standard_normal(30_000).astype(np.float32)
    values[:100] = 0
    values[20_000:] *= 100
    whole, merged = streamed(values, 6), Histogram()
    for part in (values[:100], values[100:20_000], values[20_000:]):
        other = Histogram()
        other.add(part)
        merged.merge(other)
    assert (merged.low, merged.high, merged.span) == (whole.low, whole.high, whole.span)
    # a value on the border of two bins may be counted beside it, once spans differ
    assert np.abs(np.cumsum(merged.counts - whole.counts)).max() <= 2
    assert merged.counts.sum() == len(values)


@pytest.fixture(scope="module")
def samples(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    source, chance = tiny_checkpoint.components["unet"], np.random.default_rng(0)
    folders = []
    for index, t in enumerate((900.0, 500.0, 1.0)):
        folders.append(tmp_path_factory.mktemp(f"prompt{index}"))
        feeds = {
            f"feed.{spec.name}": chance.standard_normal(spec.shape).astype(np.float32) * (1 + index)
            for spec in input_specs(source, (64, 64))
        }
        feeds["feed.timestep"] = np.array(t, np.float32)
        np.savez(folders[-1] / "unet-000.npz", allow_pickle=False, **feeds)
    return Samples(tuple(folders), ("a", "b", "c"))


class InProcess:
    """A runner without children; notes what it ran, and breaks off where it is told to."""

    def __init__(self, root: Path) -> None:
        self.root, self.done, self.breaks_at = root, dict[str, Any](), -1

    def __call__(self, stage: Any) -> Any:
        if repr(stage) not in self.done:
            if len(self.done) == self.breaks_at:
                raise KeyboardInterrupt
            into = self.root / str(len(self.done))
            into.mkdir()
            self.done[repr(stage)] = replace(stage.run(into), digest=into.name)
        return self.done[repr(stage)]


def test_every_layer_has_ranges_and_an_interrupted_calibration_goes_on(
    tiny_checkpoint: Checkpoint, samples: Samples, tmp_path: Path
) -> None:
    source, run = tiny_checkpoint.components["unet"], InProcess(tmp_path)
    run.breaks_at = 2
    with pytest.raises(KeyboardInterrupt):
        layer_ranges(source, samples, "minmax", run)
    before, run.breaks_at = list(run.done.values()), -1
    found = layer_ranges(source, samples, "minmax", run)
    assert list(run.done.values())[:2] == before
    assert len(run.done) == 4  # three folders of samples, and the choice
    entering, leaving = found.read("input"), found.read("output")
    layers = {name.removesuffix(".weight"): p for name, p in network.build(source).named_parameters() if p.dim() > 1}
    assert set(entering) == set(layers)
    assert set(leaving) == {path for path, weight in layers.items() if weight.dim() == 4}
    observed = list(run.done.values())[:3]
    steps = [each.by_timestep()["conv_in"] for each in observed]
    assert [list(each) for each in steps] == [[900.0], [500.0], [1.0]]
    assert entering["conv_in"][1] == max(high for each in steps for _, high in each.values())
    assert set(merged_histograms(observed)) >= {"input:conv_in", "output:conv_in"}


def test_nan_along_calibration_is_an_error_that_names_the_layer(
    tiny_checkpoint: Checkpoint, samples: Samples, tmp_path: Path
) -> None:
    source = tiny_checkpoint.components["unet"]
    with np.load(samples.folders[0] / "unet-000.npz") as stored:
        feeds = dict(stored)
    feeds["feed.sample"][0, 0, 0, 0] = np.nan
    np.savez(tmp_path / "unet-000.npz", allow_pickle=False, **feeds)
    with pytest.raises(ModelError, match="unet/conv_in meets NaN or infinity at its input"):
        ObserveInputs(source, Samples((tmp_path,), ("d",))).run(tmp_path)
