"""ONNX Runtime's session options that decide in which numbers it computes: its graphs say it themselves."""

from __future__ import annotations

from typing import Final

from ..arithmetic import FLOAT32, Arithmetic

# Source: microsoft/onnxruntime, `onnxruntime_session_options_config_keys.h`
FAST_BFLOAT16: Final = "mlas.enable_gemm_fastmath_arm64_bfloat16"

ARITHMETICS: Final = (
    Arithmetic(FLOAT32, {}, "float32", is_default=True, rank=2),
    Arithmetic("bf16-matmul", {FAST_BFLOAT16: "1"}, "bfloat16", rank=1),
)
