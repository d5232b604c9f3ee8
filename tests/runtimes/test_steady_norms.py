"""Large groups are added up in two steps: far more exact, and otherwise the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from diffusette.runtimes.ort.free_batch import free_batch
from diffusette.runtimes.steady_norms import LARGE, steady_norms
from numpy.typing import NDArray

from .workshop import snr_db

Array = NDArray[Any]
GROUPS = 2


def norm_of(count: int, scale: float = 1.0) -> onnx.ModelProto:
    """GroupNorm's core as the exporter writes it, over groups of `count` values."""
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 18]>
        graph (float[1, {GROUPS}, {count}] x) => (float[1, {GROUPS}, {count}] z)
        <float[{GROUPS}] ones = {{{scale}, {scale}}}, float[{GROUPS}] zeros = {{0, 0}},
         int64[3] same = {{1, {GROUPS}, {count}}}> {{
            y = Reshape(x, same)
            n = InstanceNormalization <epsilon = 1e-6> (y, ones, zeros)
            z = Reshape(n, same)
        }}""")


def answer(model: onnx.ModelProto, x: Array) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def exact(x: Array) -> Array:
    wide = x.astype(np.float64)
    deviation = np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    return np.asarray((wide - wide.mean(-1, keepdims=True)) / deviation)


def test_a_large_group_gains_twenty_decibels() -> None:
    x = (np.random.default_rng(0).standard_normal((1, GROUPS, 2**20)) + 0.5).astype(np.float32)
    plain, steady = norm_of(2**20), norm_of(2**20)
    assert steady_norms(steady) == 1
    onnx.checker.check_model(steady, full_check=True)
    assert snr_db(exact(x), answer(steady, x)) > 130
    assert snr_db(exact(x), answer(steady, x)) > snr_db(exact(x), answer(plain, x)) + 20


@pytest.mark.parametrize("model", [norm_of(LARGE - 1), norm_of(LARGE, scale=2.0)])
def test_small_groups_and_norms_with_a_scale_stay_as_they_are(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    assert steady_norms(model) == 0
    assert model.SerializeToString() == before


def test_a_count_without_divisors_still_works() -> None:
    prime = 131101
    x = np.random.default_rng(0).standard_normal((1, GROUPS, prime)).astype(np.float32)
    model = norm_of(prime)
    assert steady_norms(model) == 1
    assert snr_db(exact(x), answer(model, x)) > 100


def test_its_batch_can_be_freed() -> None:
    import onnx_ir as ir

    model = norm_of(LARGE)
    steady_norms(model)
    free = ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))
    free_batch(free)
    x = np.random.default_rng(0).standard_normal((2, GROUPS, LARGE)).astype(np.float32)
    assert snr_db(exact(x), answer(ir.to_proto(free), x)) > 120
