"""GPTQ as stages: what a plan with calibration samples is stored as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusette.export import contract, modules
from diffusette.quantize import moments
from diffusette.quantize.calibrated import bare, layer_shapes
from diffusette.quantize.plan import Plan
from diffusette.quantize.quantized import quantized_weights
from diffusette.quantize.samples import Samples
from diffusette.quantize.stored_weights import StoredWeights
from diffusette.stages.artifacts import Checkpoint

PLAN = Plan("w4c_afp", (("conv_in.weight", "w8c_afp"), ("conv_out.weight", "fp16")))


@pytest.fixture(scope="module")
def samples(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder, chance = tmp_path_factory.mktemp("samples"), np.random.default_rng(0)
    for index in range(2):
        feeds: dict[str, Any] = {
            f"feed.{spec.name}": chance.standard_normal(spec.shape).astype(np.float32)
            for spec in contract.input_specs(tiny_checkpoint.components["unet"], (64, 64))
        }
        feeds["feed.timestep"] = np.array(100.0 + index, np.float32)
        np.savez(folder / f"unet-{index:03}.npz", **feeds)
    return Samples((folder,), ("0" * 64,))


class InProcess:
    """A runner without children; counts what it ran, and keeps what that gave."""

    def __init__(self, root: Path) -> None:
        self.root, self.done = root, [""][1:]
        self.given: list[Any] = []

    def __call__(self, stage: Any) -> Any:
        into = self.root / str(len(self.done))
        into.mkdir(parents=True)
        self.done.append(type(stage).__name__)
        self.given.append(replace(stage.run(into), digest=str(len(self.done))))
        return self.given[-1]


def test_every_code_comes_from_gptq_and_errors_at_the_output_shrink(
    tiny_checkpoint: Checkpoint, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    source = tiny_checkpoint.components["unet"]
    monkeypatch.setattr(moments, "CHUNK_BYTES", 2**20)
    run = InProcess(tmp_path / "run")
    plan = replace(PLAN, samples=samples)
    stored = StoredWeights(source, plan, quantized_weights(source, plan, run))
    assert run.done[-1] == "PickCodes"
    assert set(run.done[:-1]) == {"RoundLayers"}
    plain = StoredWeights(source, PLAN, quantized_weights(source, PLAN, InProcess(tmp_path / "plain")))
    assert stored.codes("conv_in.weight").values.dtype == np.int8
    assert stored.scheme("conv_out.weight").name == "fp16"

    def output_error(weights: StoredWeights) -> float:
        wrapped = modules.load(source)
        total = 0.0
        with torch.no_grad():
            feeds = list(samples.feeds("unet"))
            truth = [moments.run_once(wrapped, each) for each in feeds]
            for name in weights.names():
                wrapped.m.get_parameter(name).copy_(torch.from_numpy(weights.read(name)))  # type: ignore[union-attr]
            total = sum(
                float(((moments.run_once(wrapped, f) - t) ** 2).sum()) for f, t in zip(feeds, truth, strict=True)
            )
        return total

    assert output_error(stored) < 0.7 * output_error(plain)


def test_samples_decide_the_key_of_a_plan_with_codes_only(samples: Samples) -> None:
    assert Plan("w4c_afp", samples=samples).key() != Plan("w4c_afp").key()
    assert Plan("fp16", samples=samples).key() == Plan("fp16").key()


def test_layers_are_known_from_headers_alone(tiny_checkpoint: Checkpoint) -> None:
    for component, source in tiny_checkpoint.components.items():
        wrapped = modules.load(source)
        found: Mapping[str, Any] = moments.weighted_modules(bare(wrapped))
        assert {path: tuple(layer.weight.shape) for path, layer in found.items()} == layer_shapes(source), component
