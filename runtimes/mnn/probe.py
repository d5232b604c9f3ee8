"""A matrix product whose answer tells in what numbers MNN has computed it.

Factors are multiples of 1/8 in 0..1, exact in float16 and bfloat16. Their products are multiples of 1/64 and sums stay
below 1024, exact in float32; float16 holds only quarters above 256, so it must round both sums on their way and results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from ...pipeline.artifacts import TargetModel, TensorSpec
from ..protocol import Array
from .flat import pack, read

ROWS, DEPTH, COLUMNS = 8, 1024, 8
_SEED: Final = 0


def probe_input() -> dict[str, Array]:
    """What to feed: x [8, 1024]."""
    return {"x": _factors()[0]}


def exact_sums() -> Array:
    """x w, [8, 8], as float32 products and sums give it in any order.

    float16(of this): results were stored in float16 and summed in float32. Anything else: summed in fewer bits.
    """
    x, weight = _factors()
    return np.asarray(x @ weight)


def probe_model(into: Path) -> TargetModel:
    """Write `probe.mnn`: y [8, 8] = x [8, 1024] w."""
    import MNN.expr as expr

    x = expr.placeholder([ROWS, DEPTH], expr.NCHW, expr.float)
    x.name = "x"
    weight = expr.const(_factors()[1], [DEPTH, COLUMNS], expr.NCHW, expr.float)
    product = expr.matmul(x, weight)
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
        inputs=(TensorSpec("x", "float32", (ROWS, DEPTH)),),
        outputs=(TensorSpec("y", "float32", (ROWS, COLUMNS)),),
        bits_per_weight=32.0,
    )


def _factors() -> tuple[Array, Array]:
    eighths = np.random.default_rng(_SEED).integers(0, 9, ROWS * DEPTH + DEPTH * COLUMNS).astype(np.float32) / 8
    return eighths[: ROWS * DEPTH].reshape(ROWS, DEPTH), eighths[ROWS * DEPTH :].reshape(DEPTH, COLUMNS)
