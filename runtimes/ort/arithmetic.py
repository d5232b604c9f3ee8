"""In what numbers ONNX Runtime computes: its graphs say it themselves, but for one session option."""

from __future__ import annotations

from typing import Final

from ...quantize.scheme import parse_scheme
from ...stages.artifacts import TargetModel
from ..arithmetic import FLOAT32, Arithmetic

# Source: microsoft/onnxruntime, `onnxruntime_session_options_config_keys.h`
FAST_BFLOAT16: Final = "mlas.enable_gemm_fastmath_arm64_bfloat16"
FLOAT16: Final = "fp16"

ARITHMETICS: Final = (
    Arithmetic(FLOAT32, {}, "float32", is_default=True, rank=3),
    Arithmetic(FLOAT16, {}, "float16", is_default=True, rank=1),  # of graphs that ask for it
    Arithmetic("bf16-matmul", {FAST_BFLOAT16: "1"}, "bfloat16", rank=2),
)


def computes_half(model: TargetModel) -> bool:
    """Whether the graph of `model` asks for float16 between its operators."""
    return any(parse_scheme(name).computes_half for name in model.precision.split("+"))
