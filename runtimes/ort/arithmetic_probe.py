"""A graph of one matrix product, which tells in what numbers ONNX Runtime computes on a machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...stages.artifacts import TargetModel, TensorSpec
from ...stages.hashing import sha256_of_file
from ..arithmetic import PROBE_ROWS
from ..protocol import Array


def probe_model(w: Array, into: Path, *, half: bool) -> TargetModel:
    """x [64, 1024] times `w` [1024, n]: float32 outside; with `half`, float16 inside, as in graphs of `fp16_a16`."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    depth, columns = w.shape
    weight = numpy_helper.from_array(w.astype(np.float16) if half else w, "w")
    nodes = [
        helper.make_node("MatMul", ["x.half", "w"] if half else ["x", "w"], ["y.half" if half else "y"], "product")
    ]
    if half:
        nodes.insert(0, helper.make_node("Cast", ["x"], ["x.half"], "x.half", to=TensorProto.FLOAT16))
        nodes.append(helper.make_node("Cast", ["y.half"], ["y"], "y", to=TensorProto.FLOAT))
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [PROBE_ROWS, depth])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [PROBE_ROWS, columns])
    graph = helper.make_graph(nodes, "probe", [given], [made], [weight])
    file = into / "probe.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(file))
    return TargetModel(
        folder=into,
        component="probe",
        target="ort",
        precision="fp16_a16" if half else "fp32",
        files=(file.name,),
        inputs=(TensorSpec("x", "float32", (PROBE_ROWS, depth)),),
        outputs=(TensorSpec("y", "float32", (PROBE_ROWS, columns)),),
        bits_per_weight=16.0 if half else 32.0,
        digest=sha256_of_file(file),
    )
