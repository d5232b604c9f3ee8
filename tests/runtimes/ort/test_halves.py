"""Graphs that compute in float16: what is of float16 in them, and what must never be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from diffusette.checkpoints.families.sd1 import SD1
from diffusette.quantize.islands import with_islands
from diffusette.quantize.plan import Plan
from diffusette.runtimes.ort.halves import PRODUCTS, halve, module_of
from diffusette.runtimes.ort.halves import Modules as Of
from diffusette.runtimes.ort.session import OrtSession
from diffusette.runtimes.ort.target import OrtTarget
from diffusette.runtimes.registry import get_target
from diffusette.stages.artifacts import Checkpoint, TargetModel
from diffusette.stages.errors import UnsupportedPrecision
from onnx import TensorProto, helper, numpy_helper

from ..workshop import SIZE, Workshop, snr_db

SCHEME: Final = "fp16_a16"
COMPONENTS: Final = tuple(SD1.components)
# Seen: 66 dB and more. Everything is stored in float16 between operators, and x86 computes in float32.
STORED_DB: Final = 60.0


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Checkpoint) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("halves"), demo_checkpoint.components)


def graph_of(model: TargetModel) -> Any:
    loaded = onnx.load(str(model.folder / model.files[0]), load_external_data=False)
    return onnx.shape_inference.infer_shapes(loaded, strict_mode=True).graph


def kinds(graph: Any) -> dict[str, int]:
    """Tensor -> its element type."""
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def processor_features() -> set[str]:
    """What Linux names of the processor; on AArch64 `asimdhp` is arithmetic in float16."""
    listed = Path("/proc/cpuinfo")
    return set(listed.read_text().split()) if listed.exists() else set()


@pytest.mark.parametrize("component", COMPONENTS)
def test_it_computes_what_pytorch_computes_and_keeps_the_types_of_its_ends(component: str, shop: Workshop) -> None:
    model = shop.build(OrtTarget(), component, SCHEME)
    plain = shop.build(OrtTarget(), component, "fp16")
    assert (model.inputs, model.outputs) == (plain.inputs, plain.outputs)
    with OrtSession(model, threads=1) as opened:
        (output,) = opened.run(shop.feeds(component)).values()
    assert output.dtype == np.float32
    assert snr_db(shop.reference(component), output) >= STORED_DB


@pytest.mark.parametrize("component", COMPONENTS)
def test_no_integer_passes_through_float16(component: str, shop: Workshop) -> None:
    graph = graph_of(shop.build(OrtTarget(), component, SCHEME))
    kind = kinds(graph)
    whole = {TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL}
    for node in graph.node:
        if node.op_type == "Cast" and kind[node.output[0]] == TensorProto.FLOAT16:
            assert kind[node.input[0]] == TensorProto.FLOAT, f"{node.name} narrows what is no float32"
        if node.op_type == "Cast" and kind[node.output[0]] in whole:
            assert kind[node.input[0]] != TensorProto.FLOAT16, f"{node.name} makes an integer of float16"


def test_a_timestep_is_float32_up_to_its_first_linear_layer(shop: Workshop) -> None:
    graph = graph_of(shop.build(OrtTarget(), "unet", SCHEME))
    kind, reached, products = kinds(graph), {"timestep"}, []
    for node in graph.node:
        if not reached & set(node.input):
            continue
        if node.op_type == "Cast" and kind[node.output[0]] == TensorProto.FLOAT16:
            products += [each.op_type for each in graph.node if node.output[0] in each.input]
            continue
        assert all(kind[name] == TensorProto.FLOAT for name in node.output)
        reached |= set(node.output)
    assert {"Sin", "Cos"} <= {node.op_type for node in graph.node if reached & set(node.input)}
    assert set(products) == {"Gemm"}


@pytest.mark.parametrize("component", COMPONENTS)
def test_only_what_has_a_kernel_is_of_float16_and_every_constant_fits(component: str, shop: Workshop) -> None:
    graph = graph_of(shop.build(OrtTarget(), component, SCHEME))
    kind = kinds(graph)
    constants = {t.name: t for t in graph.initializer if t.data_location != TensorProto.EXTERNAL}
    halves = set()
    for node in graph.node:
        made = {kind[name] for name in node.output}
        if node.op_type == "Cast":
            if node.input[0] in constants and made == {TensorProto.FLOAT16}:
                sizes = np.abs(numpy_helper.to_array(constants[node.input[0]]))
                assert sizes.max(initial=0) <= 65504, node.input[0]
        elif TensorProto.FLOAT16 in made:
            halves.add(node.op_type)
    lossy = {"Softmax", "InstanceNormalization", "LayerNormalization", "Sigmoid", "ReduceMean", "Resize", "Sin", "Cos"}
    assert not halves & lossy
    assert halves & PRODUCTS


def test_a_mask_that_float16_cannot_hold_is_added_in_float32(shop: Workshop) -> None:
    graph = graph_of(shop.build(OrtTarget(), "text_encoder", SCHEME))
    kind = kinds(graph)
    lows = {t.name for t in graph.initializer if t.name == "where"}
    assert lows, "the causal mask"
    for node in graph.node:
        if lows & set(node.input):
            assert node.op_type == "Add"
            assert kind[node.output[0]] == TensorProto.FLOAT


def test_layers_at_the_resolution_of_the_latent_stay_float32(shop: Workshop) -> None:
    graph = graph_of(shop.build(OrtTarget(), "unet", SCHEME))
    kind = kinds(graph)
    by_module = {module_of(n): kind[n.output[0]] for n in graph.node if n.op_type == "Conv"}
    assert by_module["conv_in"] == by_module["conv_out"] == TensorProto.FLOAT
    assert by_module["down_blocks.0.resnets.0.conv1"] == TensorProto.FLOAT
    assert by_module["mid_block.resnets.0.conv1"] == TensorProto.FLOAT16


def test_rules_keep_modules_in_float32_beside_the_scheme(shop: Workshop) -> None:
    plan = Plan(SCHEME, (("decoder.conv_in.weight", "fp16"), ("decoder.mid_block.attentions.0.to_q.weight", "fp32")))
    model = OrtTarget().build(shop.sources["vae_decoder"], SIZE, plan, shop.run)
    assert model.precision == "fp16_a16+fp16+fp32"
    graph = graph_of(model)
    kind = kinds(graph)
    of = {module_of(n): kind[n.output[0]] for n in graph.node if n.op_type in PRODUCTS}
    assert of["decoder.conv_in"] == of["decoder.mid_block.attentions.0.to_q"] == TensorProto.FLOAT
    assert of["decoder.mid_block.attentions.0.to_k"] == of["decoder.conv_out"] == TensorProto.FLOAT16
    stored = {t.name: t.data_type for t in graph.initializer}
    assert stored["decoder.conv_in.weight.fp16"] == TensorProto.FLOAT16
    assert stored["decoder.mid_block.attentions.0.to_q.weight"] == TensorProto.FLOAT


def test_a_module_without_weights_follows_those_in_it_or_around_it() -> None:
    modules = Of(("block.conv1", "attn.to_q"), ("attn2.to_q", "attn2.to_k", "out.conv"))
    assert not modules.keeps("block.act")
    assert modules.keeps("attn2")
    assert modules.keeps("out.act")
    assert not modules.keeps("")
    assert not modules.keeps("elsewhere")


def test_activations_that_overflow_make_islands_of_their_modules() -> None:
    shapes = {"a.weight": (4, 4), "b.weight": (4, 4)}
    plan, remarks = with_islands(Plan(SCHEME), shapes, {"a.weight": 1.0, "b.weight": 1.0}, {"a": 3e4}, mixes=True)
    assert dict(plan.exceptions) == {"a.weight": "keep"}
    assert "these stay float32" in remarks[0]


def test_a_constant_beyond_float16_keeps_its_operator() -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "xy")
    constants = {"w": np.eye(2), "small": np.array(1e-7), "large": np.array(1e5), "fits": np.array(0.5)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p0"], "p0")]
    for number, name in enumerate(("fits", "small", "large")):
        nodes.append(helper.make_node("Mul", [f"p{number}", name], [f"p{number + 1}"], name))
    nodes.append(helper.make_node("Identity", ["p3"], ["y"], "end"))
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 18)]
    )
    assert halve(model, Of((), ())) == 1
    kind = kinds(onnx.shape_inference.infer_shapes(model, strict_mode=True).graph)
    assert [kind[f"p{number}"] for number in range(4)] == [TensorProto.FLOAT16] * 2 + [TensorProto.FLOAT] * 2


def test_it_has_no_ort_form_and_says_why(shop: Workshop) -> None:
    model = shop.build(OrtTarget(), "text_encoder", SCHEME)
    assert not model.forms
    assert model.files[0].endswith("model.onnx")
    assert "no .ort form" in model.notes[0]
    assert model.bits_per_weight < 16.5  # vectors are float32


@pytest.mark.parametrize("name", ["ncnn", "mnn"])
def test_targets_that_choose_it_by_options_refuse_the_scheme(name: str, shop: Workshop) -> None:
    with pytest.raises(UnsupportedPrecision, match=SCHEME) as caught:
        get_target(name).build(shop.sources["unet"], SIZE, Plan(SCHEME), shop.run)
    assert "runs on --target ort" in caught.value.hint


def test_it_does_not_stand_beside_integers(shop: Workshop) -> None:
    with pytest.raises(UnsupportedPrecision, match="beside integer codes"):
        OrtTarget().build(shop.sources["unet"], SIZE, Plan("w8c_afp", (("conv_in.weight", SCHEME),)), shop.run)
