"""Which arithmetics are run on a machine, what is said beforehand, and what becomes of a runtime that dies there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusette.runtimes.arithmetic import Computed
from diffusette.runtimes.machines.machine import Machine
from diffusette.stages.artifacts import TargetModel
from diffusette.stages.errors import ToolCrashed
from diffusette.validate.machines.on_machine import OnMachine
from diffusette.validate.machines.report import MachineReport
from diffusette.validate.machines.stages import ComputedIn, MeasuredOnMachine, MeasureOnMachine
from diffusette.validate.parity import Parity
from diffusette.validate.reference.probes import ProbePlan, Probes

MODELS = {
    name: TargetModel(Path(), name, "ncnn", "fp32", (), (), (), bits_per_weight=32.0)
    for name in ("unet", "vae_decoder")
}


class Emulated:
    """A runner that computes nothing: what each arithmetic is found to compute, and what it leaves, is told."""

    def __init__(
        self, snr_db: Mapping[str, float], computed: Mapping[str, Computed], dead: tuple[str, ...] = ()
    ) -> None:
        self.snr_db, self.computed, self.dead = snr_db, computed, dead
        self.measured: list[str] = []
        self.said: list[str] = []

    def __call__(self, stage: Any) -> Any:
        if not isinstance(stage, MeasureOnMachine):
            return ComputedIn(Path(), self.computed.get(stage.arithmetic, "float32"), operations_per_second=1e9)
        name = stage.arithmetic.name
        if stage.model.component == "unet":
            self.measured.append(name)
        if name in self.dead:
            raise ToolCrashed("ncnn unet on arm64: signal SIGSEGV (11): vfmaq")
        parity = Parity(0.1, self.snr_db.get(name, 120.0), 120.0, 1.0)
        return MeasuredOnMachine(Path(), replace(stage.unanswered(), loss=parity))

    def check(self, tmp_path: Path, *names: str, minutes: int = 0) -> MachineReport:
        """The report of a bundle whose UNet takes so many `minutes` at a billion operations a second; 0: seconds."""
        bundle: Any = SimpleNamespace(
            manifest=SimpleNamespace(
                target=SimpleNamespace(name="ncnn"), time_embedding=SimpleNamespace(model_dump=dict)
            ),
            components=tuple(MODELS),
            denoiser="unet",
            model=lambda name, form=None: MODELS[name],
        )
        probes = Probes(tmp_path, ProbePlan(("x",)), (64, 64), dict.fromkeys(MODELS, ("x",)))
        operations = {"unet": minutes * 60 * 10**9, "vae_decoder": 1} if minutes else {}
        there = OnMachine(
            bundle, Machine("arm64:test"), probes, {}, None, self, tmp_path, self.said.append, 1, operations=operations
        )
        return there.check(names)


PHONE: Mapping[str, Computed] = {
    "fp16-storage": "float16 stored",
    "fp16": "float16",
    "defaults": "float16",
    "bf16": "bfloat16 stored",
}


def test_where_a_call_takes_seconds_every_arithmetic_is_run(tmp_path: Path) -> None:
    emulated = Emulated({}, PHONE)
    report = emulated.check(tmp_path)
    assert emulated.measured == ["float32", "fp16-storage", "fp16", "defaults", "bf16"]
    assert report.recommended == dict.fromkeys(MODELS, "defaults")
    assert emulated.said == []


def test_where_it_takes_minutes_the_proven_one_and_the_default_are_run_and_forecast(tmp_path: Path) -> None:
    emulated = Emulated({}, PHONE)
    assert emulated.check(tmp_path, minutes=10).ok
    assert emulated.measured == ["float32", "defaults"]
    assert emulated.said == [
        "forecast for arm64:test: about 11 minutes in float32 and 11 minutes in defaults, less what the cache has"
    ]


def test_a_default_that_fails_is_followed_by_the_next_until_one_passes(tmp_path: Path) -> None:
    emulated = Emulated({"defaults": 10.0, "fp16": 20.0}, PHONE)
    report = emulated.check(tmp_path, minutes=10)
    assert emulated.measured == ["float32", "defaults", "fp16", "fp16-storage"]
    assert [row.arithmetic.name for row in report.rows] == ["float32", "fp16-storage", "fp16", "defaults"]
    assert report.recommended == dict.fromkeys(MODELS, "fp16-storage")


def test_what_falls_back_is_not_run_where_it_takes_minutes(tmp_path: Path) -> None:
    """A processor without float16: another row's numbers would be measured again."""
    emulated = Emulated({}, {})
    report = emulated.check(tmp_path, minutes=10)
    assert emulated.measured == ["float32", "defaults"]
    assert report.recommended == dict.fromkeys(MODELS, "float32")


def test_named_ones_are_run_beside_what_is_proven(tmp_path: Path) -> None:
    emulated = Emulated({}, PHONE)
    emulated.check(tmp_path, "bf16", minutes=10)
    assert emulated.measured == ["float32", "bf16"]


def test_a_runtime_that_dies_there_is_a_failed_row_with_its_last_words(tmp_path: Path) -> None:
    report = Emulated({}, PHONE, dead=("defaults",)).check(tmp_path)
    row = next(row for row in report.rows if row.arithmetic.name == "defaults")
    assert row.verdict == "FAILED: ncnn unet on arm64: signal SIGSEGV (11): vfmaq"
    assert report.ok, "an app can choose another"
    assert any("SIGSEGV" in line for line in report.misfits())
    assert report.recommended == dict.fromkeys(MODELS, "fp16")


@pytest.mark.parametrize("minutes", [0, 10])
def test_a_bundle_that_dies_as_it_was_proven_is_not_ok_there(tmp_path: Path, minutes: int) -> None:
    report = Emulated({}, PHONE, dead=("float32",)).check(tmp_path, minutes=minutes)
    assert not report.ok
    assert "SIGSEGV" in report.failures()[0]
