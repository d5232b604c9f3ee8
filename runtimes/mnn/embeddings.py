"""Token embeddings as integer codes: MNN's low-bit weights are those of convolutions, and Gather is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...quantize.stored_weights import StoredWeights
from ..nibbles import are_halved, pack_nibbles

if TYPE_CHECKING:
    import onnx_ir as ir


def code_embeddings(graph: ir.Graph, stored: StoredWeights) -> tuple[str, ...]:
    """Let each Gather from a coded parameter look up its codes and its scales, and multiply them.

    Returns:
        The parameters that the graph has no float values of any more.
    """
    done = []
    for node in tuple(graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or not table.is_initializer() or table.name not in stored.names():
            continue
        if stored.scheme(table.name).is_float:
            continue
        if len(tuple(table.uses())) != 1:
            raise ValueError(f"{table.name} is looked up and used elsewhere")
        _look_up_codes(graph, node, table, stored)
        done.append(table.name)
    return tuple(done)


def _look_up_codes(graph: ir.Graph, node: ir.Node, table: ir.Value, stored: StoredWeights) -> None:
    import onnx_ir as ir

    name, ids = str(table.name), node.inputs[1]
    assert ids is not None
    codes, scheme = stored.codes(name), stored.scheme(name)
    groups, columns = codes.scales.shape[1], codes.values.shape[1]
    made: list[ir.Node] = []

    def constant(what: str, values: Any) -> ir.Value:
        tensor = ir.tensor(values, name=f"{name}.{what}")
        value = ir.Value(name=tensor.name, const_value=tensor, shape=ir.Shape(values.shape))
        value.dtype = tensor.dtype
        graph.register_initializer(value)
        return value

    def add(operator: str, inputs: list[ir.Value], what: str, **attributes: Any) -> ir.Value:
        made.append(ir.node(operator, inputs, attributes=attributes, name=f"{name}.{what}"))
        made[-1].outputs[0].name = f"{name}.{what}"
        return made[-1].outputs[0]

    def number(value: float, what: str) -> ir.Value:
        return constant(what, np.array(value, np.float32))

    halved = are_halved(scheme, columns)
    rows = constant("codes", pack_nibbles(codes) if halved else codes.values)
    value = add("Cast", [add("Gather", [rows, ids], "looked_up", axis=0)], "float", to=ir.DataType.FLOAT)
    if halved:
        sixteenths = add("Mul", [value, number(1 / 16, "sixteenth")], "sixteenths")
        high = add("Floor", [sixteenths], "high")
        rest = add("Mul", [add("Sub", [sixteenths, high], "rest"), number(16, "sixteen")], "low8")
        value = add("Concat", [high, add("Sub", [rest, number(8, "eight")], "low")], "unpacked", axis=-1)
    factors = add("Gather", [constant("scales", codes.scales), ids], "factors", axis=0)
    if groups > 1:
        tokens = ids.shape.numpy() if ids.shape is not None else ()
        grouped = constant("grouped", np.array([*tokens, groups, columns // groups], np.int64))
        apart = constant("apart", np.array([*tokens, groups, 1], np.int64))
        value = add("Reshape", [value, grouped], "codes_grouped")
        factors = add("Reshape", [factors, apart], "factors_apart")
    value = add("Mul", [value, factors], "value")
    if groups > 1:
        value = add("Reshape", [value, constant("whole", np.array([*tokens, columns], np.int64))], "values")
    old = node.outputs[0]
    value.name, value.shape, value.type = old.name, old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, [old], [value])
