"""Products of integers: activations rounded to 8 bits as they come, weights as codes, sums in int32.

Each input of a layer gets the scale and zero point of its own range (`DynamicQuantizeLinear`, ONNX opset 11: uint8,
one range a tensor, zero always exact), so there is nothing to calibrate. Weights are shifted to uint8: ONNX Runtime's
product of uint8 and int8 on AVX2 adds pairs in 16 bits and may saturate, the one of uint8 and uint8 does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import numpy as np

from ...export.graph import WeightSlot
from ...quantize.codes import Codes
from ...stages.errors import ExportError
from .packed import Packed, Store, add_node

_FLOAT: Final = 1  # onnx.TensorProto.FLOAT
_MIDDLE: Final = 128  # zero of a weight as uint8


def integer_products(slot: WeightSlot, codes: Codes, uses: Sequence[tuple[Any, int]], store: Store) -> Packed:
    """Conv, MatMul and Gemm of a weight of 8 bits a channel as ConvInteger and MatMulInteger.

    Raises:
        ExportError: another operator uses the weight, or its codes are in groups.
    """
    conv = refuse_other_uses(slot, codes, uses)
    shifted = (codes.values.astype(np.int16) + _MIDDLE).astype(np.uint8)
    scales = codes.scales[:, 0]
    packed = Packed()
    weight = store(f"{slot.name}.codes", shifted if conv else shifted.T, "UINT8")
    scale = store(f"{slot.name}.scales", scales.reshape(1, -1, 1, 1) if conv else scales, "FLOAT")
    middle = store(f"{slot.name}.zero", np.array(_MIDDLE, np.uint8), "UINT8")
    packed.initializers = [weight, scale, middle]
    for number, (node, _) in enumerate(uses):
        made: list[Any] = []
        x = node.input[0]
        quantized = [f"{x}.u8", f"{x}.u8.scale", f"{x}.u8.zero"]
        made.append(make_node("DynamicQuantizeLinear", [x], quantized, f"{x}.u8", node))
        add = partial(add_node, made, f"{slot.name}.use{number}", node)
        places = [quantized[0], weight.name, quantized[2], middle.name]
        sums = add("ConvInteger" if conv else "MatMulInteger", places)
        if conv:
            made[-1].attribute.extend(node.attribute)  # strides, pads, ...: pads are filled with the input's zero point
        both = add("Mul", [quantized[1], scale.name])
        bias = node.input[2] if len(node.input) > 2 else ""
        wide = add("Cast", [sums], to=_FLOAT)
        if not bias:
            made.append(make_node("Mul", [wide, both], list(node.output), node.name, node))
        else:
            scaled = add("Mul", [wide, both])
            if conv:
                shape = store(f"{slot.name}.bias_shape{number}", np.array([1, -1, 1, 1], np.int64), "INT64")
                packed.initializers.append(shape)
                bias = add("Reshape", [bias, shape.name])
            made.append(make_node("Add", [scaled, bias], list(node.output), node.name, node))
        packed.consumers[node.name] = made
    return packed


def refuse_other_uses(slot: WeightSlot, codes: Codes, uses: Sequence[tuple[Any, int]]) -> bool:
    """Whether convolutions use the weight, and not matrix products.

    Raises:
        ExportError: neither does, or both do, or its codes are in groups.
    """
    kinds = {node.op_type for node, index in uses if index == 1}
    if len(kinds) != 1 or not kinds <= {"Conv", "MatMul", "Gemm"} or codes.scales.shape[1] != 1:
        raise ExportError(
            f"weight {slot.source!r} is used by {', '.join(sorted({node.op_type for node, _ in uses}))}, "
            "for which no product of integers is known",
            hint='keep its activations in float: a recipe rule with scheme = "w8c_afp"',
        )
    return kinds == {"Conv"}


def make_node(op: str, inputs: list[str], outputs: list[str], name: str, origin: Any) -> Any:
    """A node that belongs to the module of `origin`."""
    from onnx import helper

    node = helper.make_node(op, inputs, outputs, name=name)
    node.metadata_props.extend(origin.metadata_props)
    return node
