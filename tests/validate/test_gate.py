"""What a gate's outcome is worth keeping for: answers, right or wrong, and not that a runtime died this time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusette.runtimes import registry
from diffusette.stages import run_stage as running
from diffusette.stages.artifacts import TargetModel, TensorSpec
from diffusette.stages.cache import Cache
from diffusette.stages.errors import ToolCrashed
from diffusette.stages.progress import Silent
from diffusette.stages.run_stage import run_stage
from diffusette.stages.stage import Stage
from diffusette.validate.gate import _outcome
from diffusette.validate.reference.probes import ProbePlan, Probes
from diffusette.validate.stages import GateComponent

from ..matrix.cells import in_this_process

X = np.linspace(-1, 1, 16, dtype=np.float32)[None]


class Doubler:
    """A model, its session and its target, told what to do by `answer`."""

    inputs = (TensorSpec("x", "float32", (1, 16)),)

    def __init__(self) -> None:
        self.answer: Any = ToolCrashed("ort unet gave no y (status -100)")
        self.asked = 0

    def open(self, _: TargetModel, *, threads: int) -> Doubler:
        self.asked += threads
        return self

    def run(self, feeds: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return {"y": feeds["x"] * self.answer}

    def __enter__(self) -> Doubler:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def doubler(monkeypatch: pytest.MonkeyPatch) -> Doubler:
    made = Doubler()
    monkeypatch.setattr(registry, "get_target", lambda _: made)
    monkeypatch.setattr(running, "run_in_child", in_this_process)
    return made


def test_a_runtime_that_died_fails_its_gate_once_and_an_answer_is_kept(doubler: Doubler, tmp_path: Path) -> None:
    np.savez(tmp_path / "unet-000.npz", **{"feed.x": X, "output.y": 2 * X})
    probes = Probes(tmp_path, ProbePlan(("one",)), (64, 64), {"unet": ("early",)}, digest="1" * 64)
    model = TargetModel(tmp_path, "unet", "ort", "fp32", (), doubler.inputs, doubler.inputs, 32.0, digest="2" * 64)
    gate = GateComponent(model, probes, None, {}, "1", threads=1)
    cache = Cache(tmp_path / "cache")
    cache.prepare()

    def run(stage: Stage[Any]) -> Any:
        return run_stage(stage, cache, Silent())

    crashed = _outcome(gate, run)
    assert (crashed.component, crashed.ok, crashed.verdict) == ("unet", False, "ort unet gave no y (status -100)")
    doubler.answer = np.float32(3)
    wrong = _outcome(gate, run)
    assert not wrong.ok
    assert "100 dB needed" in wrong.verdict
    doubler.answer = np.float32(2)
    assert _outcome(gate, run) == wrong, "equal inputs, equal verdict: it comes from the cache"
    assert doubler.asked == 2
