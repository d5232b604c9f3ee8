"""Every target's probe tells in what numbers this computer computes; on x86 that is float32, whatever is asked for."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
from diffusette.runtimes.arithmetic import CPU, Opening
from diffusette.runtimes.isolation import open_isolated
from diffusette.runtimes.registry import TARGETS, get_target
from diffusette.stages.artifacts import TargetModel
from diffusette.validate.machines.stages import OPENER, computed_in, probe_factors

X86 = platform.machine().lower() in ("x86_64", "amd64")
STORES_BFLOAT16 = {("ncnn", "bf16")}  # needs no instructions of the processor


def model(target: str, precision: str) -> TargetModel:
    return TargetModel(Path(), "unet", target, precision, (), (), (), bits_per_weight=16.0)


@pytest.mark.skipif(not X86, reason="elsewhere the processor decides")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", ["fp16", "fp16_a16"])
def test_a_probe_is_computed_in_float32_on_x86(target: str, precision: str, tmp_path: Path) -> None:
    runtime = get_target(target)
    if precision not in runtime.precisions:
        pytest.skip(f"{target} chooses float16 by options, not by a scheme")
    x, w = probe_factors()
    probe = runtime.probe_model(model(target, precision), w, tmp_path)
    (given,) = probe.inputs
    for arithmetic in runtime.choices([model(target, precision)]):
        if arithmetic.device != CPU:
            continue
        with open_isolated(OPENER, Opening(probe, arithmetic.name), threads=1) as session:
            (answer,) = session.run({given.name: x.reshape(given.shape)}).values()
        wanted = "bfloat16 stored" if (target, arithmetic.name) in STORES_BFLOAT16 else "float32"
        assert computed_in(x.astype(np.float64) @ w, answer) == wanted, arithmetic.name
