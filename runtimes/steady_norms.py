"""Normalisation of large groups, summed in two steps.

ONNX Runtime's InstanceNormalization adds a group up in one float32 chain, as MNN's GroupNorm does. The VAE's last ones
at 512 x 512 have 2^20 values a group, and the rounding of that sum alone costs the decoder some 20 dB (99.9 dB for
the operator by itself, where PyTorch, which adds pairwise, has 146). Sums of sums, each over about a thousand values,
keep it: the error of a chain grows with its length (Higham, "The accuracy of floating point summation", 1993).
"""

from __future__ import annotations

from math import isqrt, prod
from typing import Any, Final

# Values a group from which on it pays: measured alone, 2^16 values leave 129 dB, 2^18 117 dB.
LARGE: Final = 2**17


def steady_norms(model: Any, least: int = LARGE) -> int:
    """Rewrite, in place, every InstanceNormalization of `model` over groups of `least` values or more.

    Args:
        model: an `onnx.ModelProto` with static shapes, without its external data.
    Returns:
        How many were rewritten.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph.value_info
    }
    constants = {t.name: t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL}

    def holds(name: str, number: float) -> bool:
        return name in constants and bool(np.all(numpy_helper.to_array(constants[name]) == number))

    nodes, rewritten = [], 0
    for node in model.graph.node:
        shape = shapes.get(node.input[0], []) if node.op_type == "InstanceNormalization" else []
        plain = len(shape) == 3 and holds(node.input[1], 1.0) and holds(node.input[2], 0.0)
        if plain and prod(shape[2:]) >= least:
            nodes += _in_two_steps(model.graph, node, shape)
            rewritten += 1
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)  # the ones and zeros that were scale and bias
    return rewritten


def _in_two_steps(graph: Any, node: Any, shape: list[int]) -> list[Any]:
    """x [1, G, N] -> (x - mean) / sqrt(variance + epsilon), with N = rows * columns added up row by row."""
    import numpy as np
    from onnx import helper, numpy_helper

    batch, groups, count = shape
    columns = next(c for c in range(isqrt(count), 0, -1) if count % c == 0)
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    made: list[Any] = []

    def constant(name: str, values: Any, dtype: Any = np.int64) -> str:
        name = f"{node.output[0]}.{name}"
        graph.initializer.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def add(kind: str, *inputs: str, to: str) -> str:
        made.append(helper.make_node(kind, list(inputs), [to], name=f"{to}.{kind}"))
        made[-1].metadata_props.extend(node.metadata_props)
        return to

    def mean(of: str) -> str:
        rows = add("ReduceMean", of, constant(f"{len(made)}.axis", [3]), to=f"{of}.rows")
        return add("ReduceMean", rows, constant(f"{len(made)}.axis", [2]), to=f"{of}.mean")

    folded_shape = constant("folded_shape", [batch, groups, count // columns, columns])
    folded = add("Reshape", node.input[0], folded_shape, to=f"{node.output[0]}.folded")
    centred = add("Sub", folded, mean(folded), to=f"{folded}.centred")
    squares = add("Mul", centred, centred, to=f"{folded}.squares")
    variance = add("Add", mean(squares), constant("epsilon", epsilon, np.float32), to=f"{folded}.variance")
    deviation = add("Sqrt", variance, to=f"{folded}.deviation")
    normal = add("Div", centred, deviation, to=f"{folded}.normal")
    add("Reshape", normal, constant("shape", shape), to=node.output[0])
    return made
