"""Products of integers whose activations are rounded over ranges that calibration has found.

Convolutions are written as ONNX's Q/DQ pairs around a Conv, with an int8 weight, which ONNX Runtime turns into one
`QLinearConv`; linear layers as `MatMulIntegerToFloat` (com.microsoft), whose result stays float: between Q/DQ pairs
a matrix product would be rounded once more, or run in float32. docs/decisions/0030 has what else was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...export.graph import WeightSlot
from ...quantize.codes import Codes
from ...stages.errors import ExportError
from .packed import Packed, Store, add_node
from .products import make_node, refuse_other_uses

Range = tuple[float, float]

NOTE: Final = (
    "static: activations are rounded over calibrated ranges; on x86 processors without VNNI an app has to set ONNX "
    "Runtime's session option session.x64quantprecision to 1 and load the .onnx form, or sums of products saturate"
)

_LEVELS: Final = 255
_MOST: Final = 2**31 - 1  # a bias is added in int32


def static_products(
    slot: WeightSlot,
    codes: Codes,
    entering: Range,
    leaving: Range | None,
    uses: Sequence[tuple[Any, int]],
    store: Store,
    bias_of: Callable[[str], NDArray[np.float32]],
) -> Packed:
    """Conv, MatMul and Gemm of a weight of 8 bits a channel, on uint8 activations.

    Args:
        entering: least and greatest value of the layer's input, zero between them.
        leaving: the same of a convolution's output.
        bias_of: reads a convolution's bias, by the name that its node has for it.
    Raises:
        ExportError: another operator uses the weight, or a bias does not fit int32 at the weight's scale.
    """
    conv = refuse_other_uses(slot, codes, uses)
    packed = Packed()

    def keep(tensor: Any) -> str:
        packed.initializers.append(tensor)
        return str(tensor.name)

    def levels(what: str, limits: Range) -> tuple[str, str]:
        scale, zero = scale_of(limits)
        return keep(store(f"{slot.name}.{what}_scale", scale, "FLOAT")), keep(
            store(f"{slot.name}.{what}_zero", zero, "UINT8")
        )

    scales = codes.scales[:, 0]
    scale, zero = scale_of(entering)
    entry = levels("input", entering)
    weight = keep(store(f"{slot.name}.codes", codes.values if conv else codes.values.T, "INT8"))
    factors = keep(store(f"{slot.name}.scales", scales, "FLOAT"))
    for number, (node, _) in enumerate(uses):
        made: list[Any] = []
        x, stem = node.input[0], f"{slot.name}.use{number}"
        bias = node.input[2] if len(node.input) > 2 else ""
        add = partial(add_node, made, stem, node)
        rounded = f"{x}.u8_{scale:.6g}_{zero}"  # layers that read one tensor by one range share its rounding
        made.append(make_node("QuantizeLinear", [x, *entry], [rounded], rounded, node))
        if not conv:
            middle = keep(store(f"{slot.name}.zero{number}", np.array(0, np.int8), "INT8"))
            inputs = [rounded, weight, entry[0], factors, entry[1], middle, *([bias] if bias else [])]
            product = make_node("MatMulIntegerToFloat", inputs, list(node.output), node.name, node)
            product.domain = "com.microsoft"
            packed.consumers[node.name] = [*made, product]
            continue
        if leaving is None:
            raise ExportError(f"the output of {slot.source!r} has no calibrated range")
        wide = [
            add("DequantizeLinear", [rounded, *entry], output=f"{rounded}.wide"),
            add("DequantizeLinear", [weight, factors], axis=0),
        ]
        if bias:
            steps = scale * scales
            whole = np.rint(bias_of(bias).astype(np.float64) / steps)
            if np.abs(whole).max(initial=0) > _MOST:
                raise ExportError(
                    f"the bias of {slot.source!r} does not fit 32 bits at the scale of its weight",
                    hint='keep its activations in float: a recipe rule with scheme = "w8c_afp"',
                )
            names = [
                keep(store(f"{slot.name}.bias{number}", whole.astype(np.int32), "INT32")),
                keep(store(f"{slot.name}.bias_scales{number}", steps.astype(np.float32), "FLOAT")),
            ]
            wide.append(add("DequantizeLinear", names, axis=0))
        exit_ = levels(f"output{number}", leaving)
        raw = add("Conv", wide)
        made[-1].attribute.extend(node.attribute)  # strides, pads, ...: a pad is zero, which stays exact
        narrow = add("QuantizeLinear", [raw, *exit_])
        made.append(make_node("DequantizeLinear", [narrow, *exit_], list(node.output), node.name, node))
        packed.consumers[node.name] = made
    return packed


def scale_of(limits: Range) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scale and zero point of uint8 over `limits`, as `DynamicQuantizeLinear` (ONNX opset 11) has them."""
    low, high = min(limits[0], 0.0), max(limits[1], 0.0)
    scale = np.float32((high - low) / _LEVELS)
    if scale < np.finfo(np.float32).tiny:  # nothing but zeros
        return np.array(1.0, np.float32), np.array(0, np.uint8)
    zero = np.clip(np.rint(-low / scale), 0, _LEVELS)
    return np.array(scale, np.float32), np.array(zero, np.uint8)
