"""A model of one Gemm, which tells in what numbers ncnn computes on a machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...stages.artifacts import TargetModel, TensorSpec
from ...stages.hashing import sha256_of_file, sha256_of_json
from ..arithmetic import PROBE_ROWS
from ..protocol import Array
from .param import Layer, render
from .slots import TAG_FP32


def probe_model(w: Array, into: Path) -> TargetModel:
    """x [1, 64, 1024] times `w` [1024, n], in float32; ncnn itself knows no batch."""
    columns, rows = w.shape
    sides = {3: "1", 5: "1", 6: "1", 8: str(rows), 9: str(columns), 10: "-1"}
    layers = (Layer("Input", "x", (), ("x",), {}), Layer("Gemm", "product", ("x",), ("y",), sides))
    (into / "probe.param").write_text(render(layers))
    (into / "probe.bin").write_bytes(TAG_FP32 + np.ascontiguousarray(w.T, np.float32).tobytes())
    return TargetModel(
        into,
        "probe",
        "ncnn",
        "fp32",
        ("probe.param", "probe.bin"),
        (TensorSpec("x", "float32", (1, PROBE_ROWS, columns)),),
        (TensorSpec("y", "float32", (1, PROBE_ROWS, rows)),),
        bits_per_weight=32.0,
        digest=sha256_of_json([sha256_of_file(into / file) for file in ("probe.param", "probe.bin")]),
    )
