"""Verdicts on other machines: what passes, what falls back, what is recommended, what ends with 5."""

from __future__ import annotations

import numpy as np
import pytest
from diffusette.runtimes.arithmetic import Arithmetic, Computed
from diffusette.validate.machines.report import ArithmeticRow, MachineReport, recommendation
from diffusette.validate.machines.stages import computed_in, probe_factors
from diffusette.validate.machines.tolerances import (
    arithmetic_fidelity,
    arithmetic_image_tolerance,
    arithmetic_tolerance,
    together,
)
from diffusette.validate.parity import Parity
from diffusette.validate.report import ComponentReport
from diffusette.validate.tolerances import ImageTolerance, Tolerance

FP16 = Arithmetic("fp16", {"fast": True}, "float16", rank=1)
FLOAT32 = Arithmetic("float32", {"fast": False}, "float32", rank=2)


def component(name: str, snr_db: float, needed: float = 45.0, problem: str = "") -> ComponentReport:
    parity = None if problem else Parity(0.1, snr_db, snr_db, 1.0)
    return ComponentReport(name, "fp16", Tolerance(needed, "a test"), parity, problem=problem)


def row(arithmetic: Arithmetic, computed: Computed, *parts: ComponentReport) -> ArithmeticRow:
    return ArithmeticRow(arithmetic, computed, parts, ImageTolerance(40.0, "a test"))


def report(*rows: ArithmeticRow, recommended: dict[str, str] | None = None) -> MachineReport:
    names = [part.component for part in rows[0].components]
    proven = dict.fromkeys(names, "float32")
    return MachineReport("arm64:test", "ncnn", "1", rows, proven, proven if recommended is None else recommended)


def test_a_row_that_computes_more_exactly_than_asked_falls_back_and_never_passes() -> None:
    fallen = row(FP16, "float32", component("unet", 99.0))
    assert fallen.falls_back
    assert fallen.verdict == "falls back to float32"
    assert row(FP16, "float16", component("unet", 50.0)).verdict == "passed without picture"


def test_a_component_below_its_floor_fails_whatever_the_machine_computed() -> None:
    fallen = row(FP16, "float32", component("unet", 30.0))
    assert fallen.verdict == "FAILED: unet"
    died = row(FP16, "float16", component("unet", 0.0, problem="ncnn unet: signal SIGSEGV"))
    assert died.verdict == "FAILED: ncnn unet: signal SIGSEGV"


def test_only_what_is_proven_or_recommended_decides() -> None:
    good, bad = component("unet", 50.0), component("unet", 20.0)
    assert report(row(FLOAT32, "float32", good), row(FP16, "float16", bad)).ok
    assert report(row(FLOAT32, "float32", good), row(FP16, "float16", bad)).misfits() != []
    failed = report(row(FLOAT32, "float32", bad), row(FP16, "float16", good))
    assert not failed.ok
    assert failed.failures() == ["arm64:test, float32: unet: 20.0 dB from PyTorch, 45 dB needed, at "]
    assert not report(row(FLOAT32, "float32", good), recommended={}).ok


def test_the_recommendation_names_components_that_stay_apart() -> None:
    good = report(
        row(FLOAT32, "float32", component("unet", 50.0)), recommended={"unet": "fp16", "vae_decoder": "float32"}
    )
    assert recommendation(good) == "recommended: fp16, but vae_decoder in float32 (no picture drawn)"


def test_floors_of_weights_and_arithmetic_add_as_powers() -> None:
    assert together(45, 45) == pytest.approx(41.99, abs=0.01)
    assert together(95, 45) == pytest.approx(45.0, abs=0.01)
    assert arithmetic_tolerance("vae_decoder", "ncnn", "fp16", "float16").min_snr_db == 42.0
    assert arithmetic_fidelity("vae_decoder", "ncnn", "fp16", "float16").min_snr_db == 45.0
    assert arithmetic_fidelity("vae_decoder", "ncnn", "fp16", "float32").min_snr_db == 95.0


def test_float32_on_a_gpu_has_a_floor_of_its_own() -> None:
    assert arithmetic_fidelity("unet", "ncnn", "fp16", "float32", "vulkan").min_snr_db == 75.0
    assert arithmetic_fidelity("unet", "ncnn", "w8c_a8", "float32", "vulkan").min_snr_db == pytest.approx(7.0, abs=0.1)


def test_no_floor_of_an_arithmetic_can_be_lowered_in_passing() -> None:
    """Lower bounds: each is at most 4 dB below what the demo leaves (docs/measurements.md)."""
    for kind, component_db, unet_db in (("float16 stored", 50, 42), ("float16", 45, 33), ("bfloat16 stored", 35, 24)):
        assert arithmetic_fidelity("text_encoder", "ncnn", "fp16", kind).min_snr_db >= component_db
        assert arithmetic_fidelity("unet", "ncnn", "fp16", kind).min_snr_db >= unet_db
        assert arithmetic_image_tolerance("ncnn", "fp16", kind).min_psnr_db >= 39.8


@pytest.mark.parametrize(
    ("kind", "cast"),
    [
        ("float32", lambda sums: sums),
        ("float16 stored", lambda sums: sums.astype(np.float16)),
        ("bfloat16 stored", lambda sums: (sums.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)),
    ],
)
def test_a_probe_tells_in_what_numbers_a_sum_is_kept(kind: Computed, cast: object) -> None:
    x, w = probe_factors()
    sums = x.astype(np.float64) @ w
    assert computed_in(sums, np.asarray(cast(sums), np.float32)) == kind  # type: ignore[operator]


def test_a_probe_tells_sums_that_were_rounded_on_the_way() -> None:
    x, w = probe_factors()
    sums = x.astype(np.float64) @ w
    added = np.zeros(sums.shape, np.float16)
    for k in range(x.shape[1]):
        added = (added + (x[:, k : k + 1] * w[k]).astype(np.float16)).astype(np.float16)
    assert computed_in(sums, added.astype(np.float32)) == "float16"
    assert computed_in(sums, (sums * 0).astype(np.float32)) == "other"
    assert computed_in(sums, (sums + 3.3).astype(np.float32)) == "other"


def test_factors_of_the_probe_are_exact_in_bfloat16_and_their_sums_are_not_in_float16() -> None:
    x, w = probe_factors()
    sums = x.astype(np.float64) @ w
    for factor in (x, w):
        assert ((factor.view(np.uint32) & 0xFFFF) == 0).all()
    assert np.array_equal(sums, sums.astype(np.float32))
    assert (sums != sums.astype(np.float16)).mean() > 0.5
