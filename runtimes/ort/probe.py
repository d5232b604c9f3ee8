"""A model of one matrix product, by whose answer one tells in what numbers a machine computes.

y [8, 8] = x [8, 1024] w [1024, 8], with x and w multiples of 1/8 from 1/8 to 1. Their products are multiples of 1/64,
so every sum of float32 is exact in whatever order, and it is some 300, where float16 has steps of 1/4. An answer that
equals it was computed in float32, one that equals its rounding to float16 was stored in float16, and any other near it
was added up in float16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...pipeline.artifacts import TargetModel, TensorSpec
from ...quantize.scheme import parse_scheme
from ..arithmetic import Computed

ROWS: Final = 8
LENGTH: Final = 1024  # of the sums: long enough that a sum of float16 drops low bits

Array = NDArray[np.float32]


def probe_input() -> Array:
    """x [8, 1024]."""
    return _eighths(1, (ROWS, LENGTH))


def _eighths(seed: int, shape: tuple[int, ...]) -> Array:
    return (np.random.default_rng(seed).integers(1, 9, shape) / 8).astype(np.float32)


def _weight() -> Array:
    return _eighths(2, (LENGTH, ROWS))


def computed_in(answer: NDArray[Any]) -> Computed:
    """What `answer`, the model's y for `probe_input()`, says."""
    exact = probe_input() @ _weight()
    if np.array_equal(answer, exact):
        return "float32"
    if np.array_equal(answer, exact.astype(np.float16).astype(np.float32)):
        return "float16 stored"
    # a sum of float16 may be off by half a step of its largest part at every addition
    near = np.abs(answer - exact).max(initial=0) <= LENGTH * 2.0**-11 * np.abs(exact).max(initial=1)
    return "float16" if near else "other"


def probe_model(into: Path, scheme: str) -> TargetModel:
    """Write the model as `scheme` has it: float32 outside, inside what `fp32` and `fp16_a16` graphs have there."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    half = parse_scheme(scheme).computes_half
    weight = numpy_helper.from_array(_weight().astype(np.float16 if half else np.float32), "w")
    product = helper.make_node(
        "MatMul", ["x.half", "w"] if half else ["x", "w"], ["y.half" if half else "y"], "product"
    )
    nodes = [product]
    if half:
        nodes.insert(0, helper.make_node("Cast", ["x"], ["x.half"], "x.half", to=TensorProto.FLOAT16))
        nodes.append(helper.make_node("Cast", ["y.half"], ["y"], "y", to=TensorProto.FLOAT))
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, LENGTH])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, ROWS])
    graph = helper.make_graph(nodes, "probe", [given], [made], [weight])
    folder = into / "probe"
    folder.mkdir()
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(folder / "model.onnx")
    )
    return TargetModel(
        folder=into,
        component="probe",
        target="ort",
        precision=scheme,
        files=("probe/model.onnx",),
        inputs=(TensorSpec("x", "float32", (ROWS, LENGTH)),),
        outputs=(TensorSpec("y", "float32", (ROWS, ROWS)),),
        bits_per_weight=16.0 if half else 32.0,
    )
