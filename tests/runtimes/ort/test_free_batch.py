"""Freeing the batch of a graph: each rule on a graph of a few nodes, given as text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusette.runtimes.ort.free_batch import BATCH, free_batch
from diffusette.stages.errors import ExportError

HEADER = '<ir_version: 10, opset_import: ["" : 18]>'


def freed(graph: str) -> Any:
    """`graph` (ONNX text) with its batch freed, as a ModelProto."""
    import onnx
    import onnx_ir as ir

    proto = onnx.parser.parse_model(f"{HEADER}\n{graph}")
    onnx.checker.check_model(proto)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True))
    free_batch(model)
    return ir.to_proto(model)


def evaluated(model: Any, **feeds: Any) -> Any:
    from onnx.reference import ReferenceEvaluator

    outputs: Any = ReferenceEvaluator(model).run(None, feeds)
    return outputs[0]


def check_equal(graph: str, *shapes: tuple[int, ...]) -> None:
    """Batch 1 gives what the static graph gives; a batch of 3 gives what three batches of 1 give."""
    import onnx

    static, free = onnx.parser.parse_model(f"{HEADER}\n{graph}"), freed(graph)
    onnx.checker.check_model(free)
    generator = np.random.default_rng(0)
    rows = [generator.standard_normal((3, *shape[1:]), dtype=np.float32) for shape in shapes]
    names = [value.name for value in free.graph.input]
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in free.graph.input] == [BATCH] * len(names)
    singles = [evaluated(static, **dict(zip(names, (r[n : n + 1] for r in rows), strict=True))) for n in range(3)]
    alone = evaluated(free, **dict(zip(names, (r[:1] for r in rows), strict=True)))
    together = evaluated(free, **dict(zip(names, rows, strict=True)))
    np.testing.assert_array_equal(alone, singles[0])
    np.testing.assert_allclose(together, np.concatenate(singles), rtol=1e-6, atol=1e-6)


ATTENTION = """
g (float[1, 6, 8] x) => (float[1, 6, 8] y)
<int64[4] split = {1, 6, 2, 4}, int64[3] heads = {2, 6, 4}, int64[4] back = {1, 2, 6, 4}, int64[3] whole = {1, -1, 8}> {
    a = Reshape(x, split)
    b = Transpose <perm = [0, 2, 1, 3]> (a)
    q = Reshape(b, heads)
    k = Transpose <perm = [0, 2, 1]> (q)
    s = MatMul(q, k)
    p = Softmax <axis = -1> (s)
    o = MatMul(p, q)
    c = Reshape(o, back)
    d = Transpose <perm = [0, 2, 1, 3]> (c)
    y = Reshape(d, whole)
}"""

GROUP_NORM = """
g (float[1, 4, 2, 3] x) => (float[1, 4, 2, 3] y)
<int64[3] grouped = {0, 2, -1}, float[2] one = {1.0, 2.0}, float[2] zero = {0.0, 0.5}, int64[4] back = {1, 4, 2, 3},
 float[1, 4, 1, 1] scale = {1.0, 2.0, 3.0, 4.0}> {
    a = Reshape(x, grouped)
    b = InstanceNormalization(a, one, zero)
    c = Reshape(b, back)
    y = Mul(c, scale)
}"""

LINEAR = """
g (float[1, 3, 2] x) => (float[1, 3, 2] y)
<int64[2] rows = {-1, 2}, float[2, 2] w = {1.0, 2.0, 3.0, 4.0}, float[2] bias = {0.5, 1.0}, int64[3] back = {1, 3, 2}> {
    a = Reshape(x, rows)
    b = Gemm(a, w, bias)
    y = Reshape(b, back)
}"""

UPSAMPLE = """
g (float[1, 2, 2, 2] x, float[1, 2, 4, 4] skip) => (float[1, 4, 4, 4] y)
<float[4] scales = {1.0, 1.0, 2.0, 2.0}> {
    a = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (x, , scales)
    y = Concat <axis = 1> (a, skip)
}"""

SHAPES = """
g (float[1, 1, 4] x) => (float[1, 2] y)
<int64[1] one = {1}, int64[1] two = {2}, int64[1] from = {0}, int64[1] to = {2}, int64[1] last = {-1}> {
    a = Squeeze(x, one)
    b = Unsqueeze(a, two)
    c = Squeeze(b, last)
    y = Slice(c, from, to, last)
}"""


@pytest.mark.parametrize(
    ("graph", "shapes"),
    [
        pytest.param(ATTENTION, [(1, 6, 8)], id="attention that merges batch and heads"),
        pytest.param(GROUP_NORM, [(1, 4, 2, 3)], id="group norm"),
        pytest.param(LINEAR, [(1, 3, 2)], id="linear layer on merged rows"),
        pytest.param(UPSAMPLE, [(1, 2, 2, 2), (1, 2, 4, 4)], id="upsampling and a skip connection"),
        pytest.param(SHAPES, [(1, 1, 4)], id="squeeze, unsqueeze, slice"),
    ],
)
def test_a_batch_gives_what_its_samples_give_alone(graph: str, shapes: list[tuple[int, ...]]) -> None:
    check_equal(graph, *shapes)


def test_an_embedding_is_looked_up_for_each_sample() -> None:
    graph = """
    g (int64[1, 3] ids) => (float[1, 3, 2] y)
    <float[4, 2] table = {0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0}> { y = Gather(table, ids) }"""
    ids = np.array([[0, 1, 2], [3, 3, 0]])
    np.testing.assert_array_equal(evaluated(freed(graph), ids=ids), np.arange(8, dtype=np.float32).reshape(4, 2)[ids])


def test_what_no_sample_touches_keeps_its_shape() -> None:
    graph = """
    g (float[1, 2] x, float t) => (float[1, 2] y)
    <int64[2] shape = {1, 1}> { a = Reshape(t, shape) b = Cos(a) y = Add(x, b) }"""
    model = freed(graph)
    assert [list(i.dims) for i in model.graph.initializer] == [[2]]
    x = np.ones((2, 2), np.float32)
    np.testing.assert_array_equal(evaluated(model, x=x, t=np.float32(0)), x + 1)


def test_shapes_that_nothing_uses_any_more_are_dropped() -> None:
    names = [initializer.name for initializer in freed(LINEAR).graph.initializer]
    assert "back" not in names
    assert "rows" in names


@pytest.mark.parametrize(
    ("graph", "why"),
    [
        pytest.param("g (float[1, 2] x) => (float[1, 2] y) { y = Selu(x) }", "Selu.*no rule", id="unknown operator"),
        pytest.param(
            "g (float[1, 2] x) => (float[2, 1] y) { y = Transpose(x) }", "output 'y' does not carry", id="moved axis"
        ),
        pytest.param(
            "g (float[1, 2] x) => (float[2, 2] y) <float[2, 2] w = {1.0, 2.0, 3.0, 4.0}> { y = Add(x, w) }",
            "Add.*'w' has 2 entries along the batch",
            id="constant that is longer than the batch",
        ),
        pytest.param(
            "g (float[1, 2] x) => (float[2, 2] y) <float[1, 2] w = {1.0, 2.0}> { y = Concat <axis = 0> (x, w) }",
            "Concat.*not all of its inputs carry",
            id="concatenation along the batch",
        ),
        pytest.param(
            "g (float[1, 2] x) => (float[1, 2] y) { y = Softmax <axis = 0> (x) }", "along the batch", id="softmax"
        ),
        pytest.param(
            "g (float[1, 2] x) => (float[2, 2] y) { t = Transpose(x) y = MatMul(t, x) }",
            "MatMul.*sums over the batch",
            id="sum over the batch",
        ),
        pytest.param(
            "g (float[1, 2, 3] x) => (float[2, 3] y) <int64[2] s = {2, 3}> "
            "{ t = Transpose <perm = [1, 0, 2]> (x) y = Reshape(t, s) }",
            "Reshape.*not the slowest axis",
            id="heads before batch",
        ),
        pytest.param(
            "g (float[1, 2] x) => (float[2] y) <int64[1] zero = {0}> { y = Squeeze(x, zero) }",
            "squeezes the batch away",
            id="squeeze",
        ),
        pytest.param("g (float[2, 2] x) => (float[2, 2] y) { y = Neg(x) }", "has a batch of 2", id="batch of two"),
        pytest.param(
            "g (float[N, 2] x) => (float[N, 2] y) { y = Neg(x) }", "not static", id="batch that is free already"
        ),
    ],
)
def test_a_graph_that_cannot_be_freed_is_refused_by_name(graph: str, why: str) -> None:
    with pytest.raises(ExportError, match=why):
        freed(graph)
