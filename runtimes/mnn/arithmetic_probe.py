"""A model of one matrix product, which tells in what numbers MNN computes on a machine."""

from __future__ import annotations

from pathlib import Path

from ...stages.artifacts import TargetModel, TensorSpec
from ...stages.hashing import sha256_of_file
from ..arithmetic import PROBE_ROWS
from ..protocol import Array
from .flat import pack, read


def probe_model(w: Array, into: Path) -> TargetModel:
    """x [64, 1024] times `w` [1024, n], in float32: `probe.mnn`."""
    import MNN.expr as expr

    depth, columns = w.shape
    x = expr.placeholder([PROBE_ROWS, depth], expr.NCHW, expr.float)
    x.name = "x"
    product = expr.matmul(x, expr.const(w, list(w.shape), expr.NCHW, expr.float))
    product.name = "y"
    file = into / "probe.mnn"
    expr.save([product], str(file))
    file.write_bytes(pack({**read(file.read_bytes()), "outputName": ["y"]}))  # which `save` leaves out
    return TargetModel(
        folder=into,
        component="probe",
        target="mnn",
        precision="fp32",
        files=(file.name,),
        inputs=(TensorSpec("x", "float32", (PROBE_ROWS, depth)),),
        outputs=(TensorSpec("y", "float32", (PROBE_ROWS, columns)),),
        bits_per_weight=32.0,
        digest=sha256_of_file(file),
    )
