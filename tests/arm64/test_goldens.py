"""Golden vectors of x86 on a phone's processor, in the arithmetic a phone computes in."""

from __future__ import annotations

import pytest
from diffusette.bundle.bundle import Bundle
from diffusette.stages.progress import Silent
from diffusette.validate.goldens.of_bundle import replay_goldens

from .conftest import machine

pytestmark = pytest.mark.arm64_long  # an emulated picture takes a minute or two


@pytest.mark.parametrize(("precision", "target", "arithmetic"), [("fp16", "mnn", "fp16"), ("w8c_a8", "ort", "")])
def test_goldens_hold_within_the_limits_of_the_arithmetic(
    precision: str, target: str, arithmetic: str, demo_bundles: dict[tuple[str, str], Bundle]
) -> None:
    """MNN in float16; activations of 8 bits, which no two processors round alike, in float32."""
    there = machine("arm64")
    replayed = replay_goldens(demo_bundles[precision, target], machine=there, arithmetic=arithmetic, progress=Silent())
    assert [check.what for check in replayed.checks if not check.ok] == []
    worst = min(check.found for check in replayed.checks if check.unit == "dB SNR" and not check.golden_answers)
    assert worst < 90, "this is not float32's rounding, which has stricter limits"
    assert replayed.machine == "arm64:cortex-a76"
    assert set(replayed.arithmetics.values()) == {arithmetic or "float32"}
