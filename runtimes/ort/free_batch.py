"""A graph for batch 1 -> the same graph for any batch.

optimum's pipelines run classifier-free guidance as one batch of two, so the `onnx` form of a bundle must take any
batch. The canonical graph is static. Instead of exporting twice, the batch is followed from the inputs through
every node: a value that *carries* the batch has one axis that is n times as long for batch n, with the batch as
the slowest part of that axis (attention merges batch and heads). Target shapes of Reshape are the only constants
in which the exporter writes the batch down; they are rewritten, and everything else is only checked. What a rule
does not cover is refused by name, and the shapes for a batch of two are inferred and compared at the end.

Only the graph is touched: weights in external data are neither read nor moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Final

from ...stages.errors import ExportError

BATCH: Final = "batch_size"  # optimum's name for the axis
_PROOF: Final = 2  # the batch for which shapes are inferred as proof; any number but 1

Axes = Mapping[Any, int]  # ir.Value that carries the batch -> its axis


class _Refused(ExportError):
    """A rule cannot follow the batch; `free_batch` adds the node's name."""


def free_batch(model: Any) -> None:
    """Give `model` (an `onnx_ir.Model` with inferred static shapes) a symbolic batch, in place.

    The leading axis of every input and output becomes `BATCH`; scalar inputs (`timestep`) stay as they are.

    Raises:
        ExportError: a node mixes the batch with something else, or its operator is not known here.
    """
    import onnx_ir as ir

    axes: dict[Any, int] = {}
    for value in model.graph.inputs:
        if value.shape.rank():
            if _dims(value)[0] != 1:
                raise ExportError(f"input {value.name!r} has a batch of {_dims(value)[0]}, not 1")
            axes[value] = 0
    for node in model.graph:
        if not any(value in axes for value in node.inputs):
            continue
        rule = _RULES.get(node.op_type) if node.domain == "" else None
        try:
            if rule is None:
                raise _Refused("no rule tells what this operator does with a batch")
            axis = rule(node, axes)
        except _Refused as refusal:
            raise ExportError(
                f"the batch cannot be freed at {node.op_type} node {node.name!r}: {refusal.what}",
                hint="add a rule to runtimes/ort/free_batch.py",
            ) from None
        axes.update((value, axis) for value in node.outputs)
    for value in model.graph.outputs:
        if axes.get(value) != 0:
            raise ExportError(f"output {value.name!r} does not carry the batch on its leading axis")
    _prove(model, axes)
    for value, axis in axes.items():
        dims: list[int | str | None] = list(_dims(value))
        dims[axis] = BATCH if dims[axis] == 1 else None  # None: a multiple, for which a name would only mislead
        value.shape = ir.Shape(dims)


def _dims(value: Any) -> tuple[int, ...]:
    if value.shape is None or not all(isinstance(d, int) for d in value.shape):
        raise _Refused(f"the shape of {value.name!r} is {value.shape}, not static")
    return tuple(value.shape)


def _constant(value: Any) -> list[int]:
    if value is None or value.const_value is None:
        raise _Refused(f"{value.name if value else 'an input'!r} is not a constant")
    return [int(number) for number in value.const_value.numpy().reshape(-1)]


def _attribute(node: Any, name: str, default: Any = None) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _broadcast(node: Any, axes: Axes) -> int:
    """Elementwise with numpy's broadcasting, which aligns axes from the right."""
    ranks = [len(_dims(value)) for value in node.inputs if value is not None]
    carrying = [value for value in node.inputs if value in axes]
    from_right = {len(_dims(value)) - axes[value] for value in carrying}
    lengths = {_dims(value)[axes[value]] for value in carrying}
    if len(from_right) != 1 or len(lengths) != 1:
        raise _Refused("its inputs carry the batch on different axes")
    right = from_right.pop()
    for value in node.inputs:
        if value is not None and value not in axes and len(dims := _dims(value)) >= right and dims[-right] != 1:
            raise _Refused(f"{value.name!r} has {dims[-right]} entries along the batch")
    return max(ranks) - right


def _first_axis_of_first_input(node: Any, axes: Axes) -> int:
    """Conv, Gemm and friends: sample by sample along axis 0 of the data, weights the same for all."""
    if axes.get(node.inputs[0]) != 0 or any(value in axes for value in node.inputs[1:]):
        raise _Refused("only axis 0 of its first input may carry the batch")
    if _attribute(node, "transA", 0):
        raise _Refused("transA moves the batch into the sum")
    return 0


def _argmax(node: Any, axes: Axes) -> int:
    axis, rank = axes[node.inputs[0]], len(_dims(node.inputs[0]))
    along = _attribute(node, "axis", 0) % rank
    if axis >= along:
        raise _Refused("it looks along the batch, or drops an axis before it")
    return axis


def _reduce(node: Any, axes: Axes) -> int:
    if len(node.inputs) < 2:
        raise _Refused("it reduces all axes")
    axis, rank = axes[node.inputs[0]], len(_dims(node.inputs[0]))
    reduced = {along % rank for along in _constant(node.inputs[1])}
    if axis in reduced:
        raise _Refused("it reduces the batch")
    return axis if _attribute(node, "keepdims", 1) else axis - sum(along < axis for along in reduced)


def _resize(node: Any, axes: Axes) -> int:
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        raise _Refused("it is given sizes, which name the batch, instead of scales")
    return _first_axis_of_first_input(node, axes)


def _matmul(node: Any, axes: Axes) -> int:
    left, right = node.inputs
    if left in axes and axes[left] == len(_dims(left)) - 1:
        raise _Refused("it sums over the batch")
    if right in axes and axes[right] >= len(_dims(right)) - 2:
        raise _Refused("its right side carries the batch in a matrix axis")
    if left in axes and axes[left] == len(_dims(left)) - 2:
        if right in axes:
            raise _Refused("its inputs carry the batch on different axes")
        return max(len(_dims(left)), len(_dims(right))) - 2  # rows stay rows
    return _broadcast(node, axes)


def _normalised_from(node: Any, axes: Axes) -> int:
    """LayerNormalization: all axes from `axis` on are normalised together."""
    data = node.inputs[0]
    if data not in axes or axes[data] >= _attribute(node, "axis", -1) % len(_dims(data)):
        raise _Refused("it normalises over the batch")
    return axes[data]


def _along_another_axis(default: int) -> Callable[[Any, Axes], int]:
    """Softmax, Split: work along one axis, which must not be that of the batch."""

    def rule(node: Any, axes: Axes) -> int:
        data = node.inputs[0]
        if data not in axes or axes[data] == _attribute(node, "axis", default) % len(_dims(data)):
            raise _Refused("it works along the batch")
        return axes[data]

    return rule


def _concat(node: Any, axes: Axes) -> int:
    if not all(value in axes for value in node.inputs) or len({axes[value] for value in node.inputs}) != 1:
        raise _Refused("not all of its inputs carry the batch on the same axis")
    return _along_another_axis(0)(node, axes)


def _slice(node: Any, axes: Axes) -> int:
    data = node.inputs[0]
    starts = _constant(node.inputs[1])
    rank = len(_dims(data))
    along = _constant(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else range(len(starts))
    if data not in axes or axes[data] in {axis % rank for axis in along}:
        raise _Refused("it slices the batch")
    return axes[data]


def _transpose(node: Any, axes: Axes) -> int:
    rank = len(_dims(node.inputs[0]))
    order = list(_attribute(node, "perm", range(rank - 1, -1, -1)))
    return order.index(axes[node.inputs[0]])


def _unsqueeze(node: Any, axes: Axes) -> int:
    rank = len(_dims(node.outputs[0]))
    added = {axis % rank for axis in _constant(node.inputs[1])}
    return [axis for axis in range(rank) if axis not in added][axes[node.inputs[0]]]


def _squeeze(node: Any, axes: Axes) -> int:
    dims = _dims(node.inputs[0])
    given = len(node.inputs) > 1 and node.inputs[1] is not None
    dropped = {axis % len(dims) for axis in _constant(node.inputs[1])} if given else {
        axis for axis, length in enumerate(dims) if length == 1
    }  # fmt: skip
    if axes[node.inputs[0]] in dropped:
        raise _Refused("it squeezes the batch away")
    return [axis for axis in range(len(dims)) if axis not in dropped].index(axes[node.inputs[0]])


def _gather(node: Any, axes: Axes) -> int:
    """Embedding lookup: the same table for all, indices along the batch."""
    table, indices = node.inputs
    if table in axes:
        raise _Refused("it looks up in a table that carries the batch")
    return int(_attribute(node, "axis", 0)) % len(_dims(table)) + axes[indices]


def _reshape(node: Any, axes: Axes) -> int:
    """Let the target shape copy or infer the axis that holds the batch.

    In row-major order the batch stays the slowest part of the first axis that is not a leading 1, or of a
    leading 1 itself: axis 0 of the target. Were anything slower than the batch, its place could not be told.
    """
    data, target = node.inputs
    dims, axis = _dims(data), axes.get(data)
    if axis is None or prod(dims[:axis]) != 1:
        raise _Refused("the batch is not the slowest axis of its input")
    written, resolved = _constant(target), list(_dims(node.outputs[0]))
    copies = not _attribute(node, "allowzero", 0) and axis == 0 and dims[0] == resolved[0]
    if written[0] == -1 or (written[0] == 0 and copies):
        return 0
    resolved[0] = 0 if copies else -1  # a copied axis stays named in shape inference, an inferred one does not
    node.replace_input_with(1, _shape_constant(node.graph, resolved))
    if not target.uses():
        del node.graph.initializers[target.name]
    return 0


def _shape_constant(graph: Any, shape: list[int]) -> Any:
    import numpy as np
    import onnx_ir as ir

    name = "shape_" + "_".join(map(str, shape)).replace("-", "minus_")
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(shape, np.int64), name=name)
        graph.register_initializer(
            ir.Value(name=name, shape=ir.Shape([len(shape)]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
        )
    return graph.initializers[name]


_ELEMENTWISE: Final = {
    "Abs", "Add", "And", "Cast", "Clip", "Cos", "Div", "Equal", "Erf", "Exp", "Gelu", "Greater", "Identity", "IsNaN",
    "Less", "Log", "Max", "Min", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Sigmoid", "Sin", "Sqrt",
    "Sub", "Tanh", "Where",
}  # fmt: skip

_RULES: Final[dict[str, Callable[[Any, Axes], int]]] = {
    **dict.fromkeys(_ELEMENTWISE, _broadcast),
    **dict.fromkeys(("Conv", "Gemm", "InstanceNormalization", "GroupNormalization"), _first_axis_of_first_input),
    "ArgMax": _argmax,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    "Resize": _resize,
    "MatMul": _matmul,
    "LayerNormalization": _normalised_from,
    "Softmax": _along_another_axis(-1),
    "Split": _along_another_axis(0),
    "Concat": _concat,
    "Slice": _slice,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Gather": _gather,
    "Reshape": _reshape,
}


def _prove(model: Any, axes: Axes) -> None:
    """Infer every shape afresh for a batch of `_PROOF`: each must be what following the batch predicts."""
    import onnx
    import onnx_ir as ir

    proto = ir.to_proto(model)
    expected = {}
    for value, axis in axes.items():
        dims = list(_dims(value))
        dims[axis] *= _PROOF
        expected[value.name] = tuple(dims)
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    for entry in proto.graph.input:
        for place, length in enumerate(expected.get(entry.name, ())):
            entry.type.tensor_type.shape.dim[place].dim_value = length
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    for entry in [*inferred.value_info, *inferred.output]:
        shape = tuple(dim.dim_value for dim in entry.type.tensor_type.shape.dim)
        if expected.pop(entry.name, shape) != shape:
            raise ExportError(f"with a batch of {_PROOF}, {entry.name!r} would have the shape {shape}")
    left = set(expected) - {entry.name for entry in proto.graph.input}
    if left:
        raise ExportError(f"with a batch of {_PROOF}, no shape can be inferred for {min(left)!r}")
