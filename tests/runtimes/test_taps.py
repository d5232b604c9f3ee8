"""Which tensors of a graph are boundaries of PyTorch's modules, and what a partial run needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusette.runtimes.mnn.taps import parts_of
from diffusette.runtimes.ncnn.layout import PARAMETER, Blob
from diffusette.runtimes.ncnn.param import parse
from diffusette.runtimes.ncnn.slots import Slot
from diffusette.runtimes.ncnn.taps import wiring_of
from diffusette.runtimes.ort.taps import onnx_file
from diffusette.runtimes.registry import TARGETS, get_target
from diffusette.runtimes.taps import Node, Tapped, boundaries, common_module, inherit_modules, needed_feeds
from diffusette.stages.artifacts import TargetModel
from diffusette.stages.errors import UsageError

GRAPH = [
    Node("Cast", "block.conv", ("conv.half",), ("conv.weight",)),
    Node("Conv", "block.conv", ("x", "conv.weight"), ("c",)),
    Node("Sigmoid", "block.act", ("c",), ("s",)),
    Node("Mul", "block.act", ("c", "s"), ("a",)),
    Node("Split", "", ("a",), ("left", "right")),
    Node("Mul", "block", ("left", "right"), ("gated",)),
    Node("MatMul", "block.proj", ("gated", "proj.weight"), ("p",)),
    Node("Add", "block", ("p", "x"), ("y",)),
]


def test_boundaries_are_what_one_module_makes_and_another_reads() -> None:
    keys = boundaries(GRAPH, ["x"], ["y"])
    assert set(keys["c"]) == {"block.conv:out", "block.act:in"}
    assert set(keys["a"]) == {"block.act:out"}
    assert set(keys["gated"]) == {"block.proj:in"}
    assert set(keys["p"]) == {"block.proj:out"}
    assert set(keys["y"]) == {"block:out", ":out"}
    assert {"s", "left", "right", "conv.weight", "proj.weight"}.isdisjoint(keys), "inside of a module, or constants"


def test_a_module_with_several_outputs_has_no_output_key() -> None:
    graph = [
        Node("A", "m.a", ("x",), ("one",)),
        Node("B", "m.b", ("x",), ("two",)),
        Node("C", "n", ("one", "two"), ("y",)),
    ]
    keys = boundaries(graph, ["x"], ["y"])
    assert all("m:out" not in found for found in keys.values())
    assert "m.a:out" in keys["one"]


def test_every_output_is_one_of_the_module_that_makes_it() -> None:
    graph = [Node("A", "states", ("x",), ("y",)), Node("B", "projection", ("y",), ("pooled",))]
    assert "pooled" not in boundaries(graph, ["x"], ["y"])
    keys = boundaries(graph, ["x"], ["y", "pooled"])
    assert set(keys["y"]) == {"states:out", "projection:in", ":out"}
    assert set(keys["pooled"]) == {"projection:out"}


def test_a_node_without_module_takes_what_its_neighbours_share() -> None:
    split = next(node for node in inherit_modules(GRAPH) if node.op == "Split")
    assert split.module == "block"
    assert common_module(["a.b.c", "a.b", "a.b.d"]) == "a.b"
    assert common_module(["a.bc", "a.b"]) == "a"
    assert common_module([]) == ""


def test_a_partial_run_needs_the_nearest_feeds_only() -> None:
    makers = {tensor: node.inputs for node in GRAPH for tensor in node.outputs}
    assert needed_feeds("y", makers, {"x", "c", "p"}) == {"p", "x"}
    assert needed_feeds("p", makers, {"x", "c", "p"}) == {"c"}


CHAIN = {"a": frozenset("x"), "b": frozenset("a"), "c": frozenset("ab"), "d": frozenset("c")}
SIZE = dict.fromkeys("xabcd", 8)


@pytest.mark.parametrize("most", [1, 32, 10**6])
def test_no_part_of_mnn_both_reads_and_makes_a_tensor_that_is_fed(most: int) -> None:
    parts = parts_of(CHAIN, SIZE, frozenset("xabcd"), most)
    assert sorted(tensor for part in parts for tensor in part.made) == ["a", "b", "c", "d"]
    assert len(parts) == (4 if most == 1 else 3)
    for part in parts:
        assert part.inputs == set().union(*(CHAIN[tensor] for tensor in part.made))
        assert len(part.made) == 1 or part.bytes <= most


@pytest.mark.parametrize(("most", "made"), [(1, ["a", "b", "c", "d"]), (24, ["ab", "c", "d"]), (10**6, ["abcd"])])
def test_parts_of_a_carried_piece_start_from_what_those_before_made(most: int, made: list[str]) -> None:
    parts = parts_of(CHAIN, SIZE, frozenset("x"), most)
    assert ["".join(part.made) for part in parts] == made
    known = {"x"}
    for part in parts:
        assert part.inputs <= known
        known |= set(part.made)


PARAM = """7767517
6 9
Input                    x                        0 1 x
Split                    split_0                  1 2 x 1 2
LayerNorm                ln_0                     1 1 1 3 0=4 1=1.0e-5 2=1
MultiHeadAttention       att_0                    1 1 3 4 0=4 1=2 2=16 3=4 4=4
BinaryOp                 add_0                    2 1 4 2 5 0=0
Convolution              conv_0                   1 1 5 y 0=4 1=3 4=0 15=1 14=0 16=1 5=1 6=144
"""


def test_an_attention_of_ncnn_shows_its_projections() -> None:
    def blob(layer: str, role: str, name: str) -> Blob:
        return Blob(Slot(layer, "", role, True, 16), PARAMETER, name, (4, 4), (0, 1))

    blobs = [
        blob("ln_0", "gamma", "norm.weight"),
        *(blob("att_0", f"{role}_weight", f"attn.to_{role}.weight") for role in ("q", "k", "v")),
        blob("att_0", "out_weight", "attn.to_out.0.weight"),
        blob("conv_0", "weight", "down.conv.weight"),
    ]
    layers = parse(PARAM)
    wiring = wiring_of(layers, layers, blobs, "y")
    assert wiring.keys["3"] == ("norm:out", "attn.to_q:in", "attn.to_k:in", "attn.to_v:in")
    assert wiring.keys["att_0/k"] == ("attn.to_k:out",)
    assert wiring.keys["att_0/mixed"] == ("attn.to_out.0:in",)
    assert wiring.keys["4"] == ("attn.to_out.0:out",)
    assert next(node.module for node in wiring.nodes if node.op == "MultiHeadAttention") == "attn"
    assert "x" not in wiring.keys, "an input of the component is computed by nothing"
    assert "5" not in wiring.keys, "the convolution pads unevenly: PyTorch's has read a padded tensor"
    assert set(wiring.keys["y"]) == {"down.conv:out", ":out"}


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_can_be_looked_into(name: str) -> None:
    assert isinstance(get_target(name), Tapped)


def test_a_model_in_the_ort_form_alone_is_refused_with_what_to_do() -> None:
    model = TargetModel(Path("x"), "unet", "ort", "fp32", ("unet/model.ort",), (), (), 32.0)
    with pytest.raises(UsageError, match="cannot be looked into") as refused:
        onnx_file(model)
    assert "onnx" in refused.value.hint
