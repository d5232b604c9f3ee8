"""Scales fitted to a whole component's answers: what changes, what may not, and what is kept where it does no good."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusette.convert.recipe import parse_recipe
from diffusette.export import contract
from diffusette.quantize import tuning
from diffusette.quantize.codes_file import FILE, QuantizedWeights
from diffusette.quantize.plan import Plan
from diffusette.quantize.quantized import quantized_weights
from diffusette.quantize.samples import Samples
from diffusette.quantize.stored_weights import StoredWeights
from diffusette.quantize.tuning import TunedWeights, TuneScales
from diffusette.stages.artifacts import Checkpoint
from diffusette.stages.errors import UsageError
from diffusette.validate.reference.calibrate import calibrated

from .test_calibrated import InProcess

PLAN = Plan("w4g32r2_afp", (("conv_in.weight", "w8c_afp"), ("conv_out.weight", "fp16")))
CALLS = 16


@pytest.fixture(scope="module")
def samples(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder, chance = tmp_path_factory.mktemp("samples"), np.random.default_rng(0)
    for index in range(CALLS):
        feeds: dict[str, Any] = {
            f"feed.{spec.name}": chance.standard_normal(spec.shape).astype(np.float32)
            for spec in contract.input_specs(tiny_checkpoint.components["unet"], (64, 64))
        }
        feeds["feed.timestep"] = np.array(100.0 + 50 * index, np.float32)
        np.savez(folder / f"unet-{index:03}.npz", **feeds)
    return Samples((folder,), ("0" * 64,))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "STEPS", 12)


def test_scales_move_and_the_component_is_nearer_on_calls_that_were_held_out(
    tiny_checkpoint: Checkpoint, samples: Samples, tmp_path: Path
) -> None:
    source = tiny_checkpoint.components["unet"]
    run = InProcess(tmp_path)
    plan = replace(PLAN, samples=samples, tuned=samples)
    tuned = StoredWeights(source, plan, quantized_weights(source, plan, run))
    before = StoredWeights(source, replace(plan, tuned=None), run.given[-2])
    found = run.given[-1]
    assert isinstance(found, TunedWeights)
    assert found.after_db > found.before_db + 0.1
    moved = 0
    for name in tuned.names():
        if tuned.scheme(name).is_float:
            assert np.array_equal(tuned.read(name), before.read(name))
            continue
        old, new = before.codes(name), tuned.codes(name)
        assert np.array_equal(old.values, new.values)
        assert (old.branch is None) == (new.branch is None)
        if old.branch is not None and new.branch is not None:
            assert np.array_equal(old.branch.up, new.branch.up)
        assert (new.scales > 0).all()
        moved += not np.array_equal(old.scales, new.scales)
    assert moved > 20


def test_scales_that_do_no_good_on_other_calls_are_not_kept(
    tiny_checkpoint: Checkpoint, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "RATE", 3.0)
    source = tiny_checkpoint.components["unet"]
    run = InProcess(tmp_path)
    plan = replace(PLAN, samples=samples, tuned=samples)
    tuned = quantized_weights(source, plan, run)
    assert tuned is not None
    assert tuned.file.read_bytes() == run.given[-2].file.read_bytes()
    assert run.given[-1].after_db == run.given[-1].before_db


def test_a_call_that_is_held_out_is_not_trained_on(
    tiny_checkpoint: Checkpoint, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusette.export import modules

    calls = tuning._Calls.of(modules.load(tiny_checkpoint.components["unet"]), samples, "unet")
    assert (list(calls.trained), list(calls.held_out)) == (list(range(14)), [14, 15])
    few = replace(calls, feeds=calls.feeds[:3], truth=calls.truth[:3], weights=calls.weights[:3])
    assert list(few.trained) == list(few.held_out) == [0, 1, 2]  # a handful: none can be spared


def test_a_batch_of_calls_is_what_they_are_alone(tiny_checkpoint: Checkpoint, samples: Samples) -> None:
    import torch
    from diffusette.export import modules

    wrapped: Any = modules.load(tiny_checkpoint.components["unet"])
    calls = tuning._Calls.of(wrapped, samples, "unet")
    with torch.no_grad():
        errors = calls.error(
            lambda feeds: wrapped(*(torch.from_numpy(np.array(feeds[name])) for name in wrapped.input_names)),
            range(CALLS),
        )
    power = torch.stack(list(calls.truth)).square().mean()
    assert float(errors.max()) < 1e-10 * float(power)


def test_the_key_knows_the_samples_and_the_codes_but_not_how_they_were_come_by(
    tiny_checkpoint: Checkpoint, samples: Samples, tmp_path: Path
) -> None:
    rounded, tuned = (replace(PLAN, samples=samples, tuned=each) for each in (None, samples))
    assert rounded.key() != tuned.key()

    def key(folder: str, codes: bytes) -> str:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / FILE).write_bytes(codes)
        quantized = QuantizedWeights(tmp_path / folder, "unet", digest=folder)
        return json.dumps(TuneScales(tiny_checkpoint.components["unet"], tuned, samples, quantized).key())

    assert key("of a search", b"codes") == key("of validate", b"codes")
    assert key("of another", b"other codes") != key("once more", b"codes")


def test_tuning_is_refused_where_a_call_takes_seconds(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusette.validate.reference import calibration

    recipe = parse_recipe('schema = 1\n[quantize]\nprecision = "w4c_afp"\nrounding = "tuned"\n', "mine.toml")
    monkeypatch.setattr(calibration, "_TUNABLE", 0)

    def never(stage: Any) -> Any:
        raise AssertionError(f"{stage} was run")

    with pytest.raises(UsageError, match=r"hours, for a UNet of this size at 64x64") as refused:
        calibrated({"unet": PLAN}, tiny_checkpoint, (64, 64), recipe.rounding, never)
    assert 'rounding = "gptq"' in (refused.value.hint or "")
