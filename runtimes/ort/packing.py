"""Integer codes as ONNX: the initializers and nodes that stand where a float weight stood.

A weight is widened by plain operators, which ONNX Runtime folds when it loads a model: the speed and memory of
float32 from a small file; told not to fold, it widens as it goes. `DequantizeLinear` is not used: at default
options ONNX Runtime leaves it in front of convolutions, where it takes ten times the convolution, and merges it into
matrix products that then round activations to 8 bits (docs/decisions/0030).

A low-rank branch (docs/decisions/0040) is added to the weight where that is widened, so that it costs nothing once ONNX
Runtime has folded it; beside MatMulNBits, which keeps the codes, to the product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...export.graph import WeightSlot
from ...quantize.codes import Codes
from ...quantize.low_rank import Branch
from ...quantize.scheme import Scheme
from ...stages.errors import ExportError
from .packed import Packed, Store, add_node
from .products import integer_products

NIBBLES: Final = "nibbles"
"""Name of the table [256, 2] that turns a byte into the two 4-bit numbers in it, the low half first."""

FLOAT_ACTIVATIONS: Final = 1
"""`accuracy_level` of MatMulNBits: float32. Level 4, the default where ORT makes such nodes, rounds activations."""


def pack(slot: WeightSlot, codes: Codes, scheme: Scheme, uses: Sequence[tuple[Any, int]], store: Store) -> Packed:
    """Pack the codes of one weight for the nodes that use it.

    Args:
        slot: layout in which the graph takes the weight.
        uses: (node, index of the input) of every use.
        store: writes an array and returns its initializer.
    Raises:
        ExportError: the graph wants the weight in a layout that no packing is known for.
    """
    kinds = {(node.op_type, index) for node, index in uses}
    if kinds == {("Gather", 0)} and slot.permute is None and slot.shape == slot.stored:
        return _gathered(slot, codes, scheme, uses, store)
    if scheme.activation_bits == 8:
        return integer_products(slot, codes, uses, store)
    linear = kinds == {("MatMul", 1)} and slot.permute == (1, 0)
    if linear and scheme.weight_bits == 4 and fits_matmul_nbits(codes):
        return _matmul_nbits(slot, codes, uses, store)
    return _widened(slot, codes, scheme, store)


def fits_matmul_nbits(codes: Codes) -> bool:
    """Whether the groups are blocks of MatMulNBits: a power of two, 16 at least."""
    group = codes.values.shape[1] // codes.scales.shape[1]
    return codes.values.ndim == 2 and group >= 16 and group & (group - 1) == 0


def _widened(slot: WeightSlot, codes: Codes, scheme: Scheme, store: Store) -> Packed:
    """Codes -> float -> times scale, in the layout of the graph, without a Transpose."""
    rows, groups = codes.scales.shape
    values, scales = codes.values.reshape(rows, groups, -1), codes.scales[:, :, None]  # [O, G, g], [O, G, 1]
    if slot.permute == (1, 0):
        values, scales = values.transpose(1, 2, 0), scales.transpose(1, 2, 0)  # [G, g, O], [G, 1, O]
    elif slot.permute is not None:
        raise ExportError(
            f"the graph takes weight {slot.source!r} with its axes as {slot.permute}, which no packing is known for",
            hint='keep it in float: a recipe rule with scheme = "fp16"',
        )
    packed = Packed()
    add = partial(add_node, packed.nodes, slot.name, None)
    if scheme.weight_bits == 4 and values.shape[2] % 2 == 0:
        packed.initializers.append(store(f"{slot.name}.codes", _in_pairs(values), "UINT8"))
        wide = _looked_up(packed.initializers[0].name, add)  # [.., .., half, 2]
        scales = np.repeat(scales, values.shape[2], 2) if scales.shape[2] == 1 and slot.permute else scales
        scales = scales.reshape(*scales.shape[:2], -1, 2) if scales.shape[2] > 1 else scales[..., None]
    else:
        packed.initializers.append(store(f"{slot.name}.codes", values, "INT8"))
        wide = add("Cast", [packed.initializers[0].name], to=_FLOAT)
    packed.initializers.append(store(f"{slot.name}.scales", scales, "FLOAT"))
    scaled = add("Mul", [wide, packed.initializers[-1].name])
    shape = store(f"{slot.name}.shape", np.array(slot.shape, np.int64), "INT64")
    packed.initializers.append(shape)
    if codes.branch is None:
        add("Reshape", [scaled, shape.name], output=slot.name)
        return packed
    factors = _factors(slot, codes.branch, store, packed)
    pair = [add("Cast", [factor], to=_FLOAT) for factor in (factors if slot.permute else factors[::-1])]
    product = add("Reshape", [add("MatMul", pair), shape.name])
    add("Add", [add("Reshape", [scaled, shape.name]), product], output=slot.name)
    return packed


def _factors(slot: WeightSlot, branch: Branch, store: Store, packed: Packed) -> list[str]:
    """Store the factors of a branch in float16: first what meets the input; transposed for matrix products."""
    pair = ("down", branch.down), ("up", branch.up)
    turned = slot.permute is not None
    tensors = [store(f"{slot.name}.low_rank.{tag}", each.T if turned else each, "FLOAT16") for tag, each in pair]
    packed.initializers += tensors
    return [tensor.name for tensor in tensors]


def _matmul_nbits(slot: WeightSlot, codes: Codes, uses: Sequence[tuple[Any, int]], store: Store) -> Packed:
    """`MatMulNBits` (com.microsoft): unsigned nibbles around 8, its default zero point; [N, K / block, block / 2]."""
    from onnx import helper

    rows, inner = codes.values.shape
    blocks = codes.scales.shape[1]
    packed = Packed()
    packed.initializers = [
        store(f"{slot.name}.codes", _in_pairs(codes.values.reshape(rows, blocks, -1)), "UINT8"),
        store(f"{slot.name}.scales", codes.scales.reshape(-1), "FLOAT"),
    ]
    names = [tensor.name for tensor in packed.initializers]
    sizes = {"K": inner, "N": rows, "bits": 4, "block_size": inner // blocks, "accuracy_level": FLOAT_ACTIVATIONS}
    for node, _ in uses:
        changed = helper.make_node(
            "MatMulNBits", [node.input[0], *names], list(node.output), node.name, domain="com.microsoft", **sizes
        )
        changed.metadata_props.extend(node.metadata_props)
        packed.consumers[node.name] = [changed]
    if codes.branch is not None:
        factors = _factors(slot, codes.branch, store, packed)
        add = partial(add_node, packed.nodes, f"{slot.name}.low_rank", None)
        wide = [add("Cast", [factor], to=_FLOAT) for factor in factors]
        for number, nodes in enumerate(packed.consumers.values()):
            _add_branch(nodes, wide, f"{slot.name}.low_rank.use{number}")
    return packed


def _add_branch(nodes: list[Any], factors: Sequence[str], stem: str) -> None:
    """Add to what `nodes`, a single matrix product, compute, that of its input with both factors in turn."""
    (product,) = nodes
    result, add = product.output[0], partial(add_node, nodes, stem, product)
    product.output[0] = f"{stem}.rest"
    beside = product.input[0]
    for factor in factors:
        beside = add("MatMul", [beside, factor])
    add("Add", [product.output[0], beside], output=result)


def _gathered(slot: WeightSlot, codes: Codes, scheme: Scheme, uses: Sequence[tuple[Any, int]], store: Store) -> Packed:
    """An embedding: rows are gathered as codes and widened after, so that a table of 50,000 rows is never widened."""
    from onnx import helper

    rows, groups = codes.scales.shape
    width = codes.values.shape[1]
    paired = scheme.weight_bits == 4 and width % 2 == 0
    packed = Packed()
    table = store(
        f"{slot.name}.codes", _in_pairs(codes.values) if paired else codes.values, "UINT8" if paired else "INT8"
    )
    scales = store(f"{slot.name}.scales", codes.scales.reshape(rows, groups, 1), "FLOAT")
    # 0 copies the axis: [batch, tokens, ...]
    folded = store(f"{slot.name}.folded", np.array([0, 0, groups, width // groups], np.int64), "INT64")
    whole = store(f"{slot.name}.whole", np.array([0, 0, width], np.int64), "INT64")
    packed.initializers = [table, scales, folded, whole]
    for number, (node, _) in enumerate(uses):
        made: list[Any] = []
        add = partial(add_node, made, f"{slot.name}.use{number}", node)
        found = add("Gather", [table.name, node.input[1]], axis=0)
        wide = _looked_up(found, add) if paired else add("Cast", [found], to=_FLOAT)
        scale = add("Gather", [scales.name, node.input[1]], axis=0)
        scaled = add("Mul", [add("Reshape", [wide, folded.name]), scale])
        made.append(helper.make_node("Reshape", [scaled, whole.name], list(node.output), name=node.name))
        made[-1].metadata_props.extend(node.metadata_props)
        packed.consumers[node.name] = made
    return packed


_FLOAT: Final = 1  # onnx.TensorProto.FLOAT
_INT32: Final = 6


def _in_pairs(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """[..., n] of -8..7 -> [..., n / 2] bytes of two nibbles, each around 8, the first in the low half."""
    nibbles = (np.ascontiguousarray(values) + np.int8(8)).astype(np.uint8)
    return np.asarray(nibbles[..., 0::2] | nibbles[..., 1::2] << 4)


def _looked_up(packed: str, add: Callable[..., str]) -> str:
    """Bytes [...] -> the numbers in them, [..., 2]."""
    return add("Gather", [NIBBLES, add("Cast", [packed], to=_INT32)], axis=0)


def apply(model: Any, packings: Mapping[str, Packed]) -> None:
    """Put `packings` (by the name of the weight) into `model`, an `onnx.ModelProto` that has floats in their place."""
    from onnx import numpy_helper

    exchanged = {name: nodes for packed in packings.values() for name, nodes in packed.consumers.items()}
    nodes = [node for packed in packings.values() for node in packed.nodes]
    made = set()
    for node in model.graph.node:
        for each in exchanged.get(node.name, [node]):
            if each.output[0] not in made:  # layers of one input share its rounding
                nodes.append(each)
                made.add(each.output[0])
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in packings]
    kept += [tensor for packed in packings.values() for tensor in packed.initializers if tensor.name in used]
    if any(NIBBLES in node.input for node in nodes):
        byte = np.arange(256)
        kept.append(numpy_helper.from_array(np.stack([byte & 15, byte >> 4], 1).astype(np.float32) - 8, NIBBLES))
    for repeated, values in ((model.graph.node, nodes), (model.graph.initializer, kept)):
        del repeated[:]
        repeated.extend(values)
    if any(node.domain == "com.microsoft" for node in nodes):
        added = model.opset_import.add()
        added.domain, added.version = "com.microsoft", 1
