"""Integer weights on ONNX Runtime: PyTorch's numbers with the same codes, in both forms and at anybody's options."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from diffusette.export import modules
from diffusette.export.graph import WeightSlot
from diffusette.quantize.codes import round_to_nearest
from diffusette.quantize.plan import Plan
from diffusette.quantize.quantized import quantized_weights
from diffusette.quantize.ranges import layer_ranges
from diffusette.quantize.samples import Samples
from diffusette.quantize.scheme import parse_scheme
from diffusette.quantize.stored_weights import StoredWeights
from diffusette.runtimes.ort.packing import apply, pack
from diffusette.runtimes.ort.static_products import scale_of, static_products
from diffusette.runtimes.ort.target import OrtTarget
from diffusette.stages.artifacts import Checkpoint, TargetModel
from diffusette.stages.errors import ExportError, UnsupportedPrecision
from diffusette.validate.reference.torch_session import round_weights

from ..workshop import SIZE, Array, Workshop, snr_db

INTEGERS = [name for name in OrtTarget.precisions if name.startswith("w") and name.endswith("afp")]
MIX = Plan("w8c_afp", (("decoder.conv_in", "fp16"), ("decoder.mid_block.resnets.0.conv1.weight", "w4g64_afp")))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Checkpoint) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("coded"), demo_checkpoint.components)


def built(shop: Workshop, component: str, plan: Plan) -> TargetModel:
    model = OrtTarget().build(shop.sources[component], SIZE, plan, shop.run)
    assert isinstance(model, TargetModel)
    return model


def rounded_torch(shop: Workshop, component: str, plan: Plan) -> Array:
    """What PyTorch answers with the weights that `plan` leaves."""
    import torch

    source = shop.sources[component]
    module = modules.load(source)
    round_weights(module, StoredWeights(source, plan, quantized_weights(source, plan, shop.run)))
    with torch.inference_mode():
        answer: Array = module(*(torch.from_numpy(a) for a in shop.feeds(component).values())).numpy()
    return answer


def output(session: Any, feeds: dict[str, Array]) -> Array:
    (value,) = session.run(feeds).values()
    return np.asarray(value)


@pytest.mark.parametrize(
    ("component", "plan"),
    [
        *(("text_encoder", Plan(name)) for name in INTEGERS),
        ("vae_decoder", Plan("w8c_afp")),
        ("vae_decoder", Plan("w4g64_afp")),
        ("vae_decoder", Plan("w4cr8_afp")),
        ("text_encoder", Plan("w4g64r8_afp")),
        ("text_encoder", Plan("w8cr8_afp")),
        ("vae_decoder", MIX),
    ],
    ids=lambda value: value.label if isinstance(value, Plan) else value,
)
def test_it_computes_what_pytorch_computes_with_the_same_codes(component: str, plan: Plan, shop: Workshop) -> None:
    model, feeds, expected = built(shop, component, plan), shop.feeds(component), rounded_torch(shop, component, plan)
    assert model.precision == plan.label
    for form in (model.files, model.forms["ort"]):
        with OrtTarget().open(replace(model, files=form), threads=1) as session:
            assert snr_db(expected, output(session, feeds)) > 100
    # an app sets no options, or asks for little memory: nothing may round activations behind its back
    for config in ({}, {"optimization.disable_specified_optimizers": "ConstantFolding"}):
        options = onnxruntime.SessionOptions()
        for key, value in config.items():
            options.add_session_config_entry(key, value)
        session = onnxruntime.InferenceSession(str(model.folder / model.files[0]), options)
        assert snr_db(expected, session.run(None, feeds)[0]) > 100


@pytest.mark.parametrize("scheme", ["w8c_afp", "w4g64_afp", "w4g64r8_afp"])
def test_bits_are_those_of_the_plan_and_the_file_holds_nothing_else(scheme: str, shop: Workshop) -> None:
    model, plan = built(shop, "vae_decoder", Plan(scheme)), Plan(scheme)
    source = shop.sources["vae_decoder"]
    shapes = StoredWeights(source, plan, quantized_weights(source, plan, shop.run)).shapes()
    assert model.bits_per_weight == pytest.approx(plan.bits_per_weight(shapes), abs=1e-3)
    data = (model.folder / "vae_decoder/model.onnx_data").stat().st_size
    assert 0.9 < data / (plan.bits(shapes) / 8) < 1.03  # weights below 1 KiB lie in the graph, and 64-byte holes here


def test_the_batch_is_free_and_values_of_shapes_stay_out_of_the_file(shop: Workshop) -> None:
    model = built(shop, "vae_decoder", Plan("w8c_afp"))
    graph = onnx.load(str(model.folder / model.files[0]), load_external_data=False).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch_size"
    session = onnxruntime.InferenceSession(str(model.folder / model.files[0]))
    latents = shop.feeds("vae_decoder")["latent_sample"]
    one, two = (session.run(None, {"latent_sample": np.repeat(latents, n, 0)})[0] for n in (1, 2))
    assert two.shape[0] == 2
    assert snr_db(one, two[:1]) > 100


def test_linear_layers_of_four_bits_are_multiplied_as_they_are(shop: Workshop) -> None:
    model = built(shop, "text_encoder", Plan("w4g64_afp"))
    graph = onnx.load(str(model.folder / model.files[0]), load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["MatMulNBits"] > 10
    levels = {a.i for node in graph.node for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {1}  # float32 activations
    assert "DequantizeLinear" not in kinds


def test_a_table_of_embeddings_is_never_widened(shop: Workshop) -> None:
    for scheme in ("w8c_afp", "w4g64_afp"):
        model = built(shop, "text_encoder", Plan(scheme))
        graph = onnx.load(str(model.folder / model.files[0]), load_external_data=False).graph
        (user,) = (node for node in graph.node if "embeddings.token_embedding.weight.codes" in node.input)
        assert user.op_type == "Gather"


def test_a_layout_that_cannot_be_packed_is_refused_by_name() -> None:
    scheme = parse_scheme("w8c_afp")
    codes = round_to_nearest(np.ones((4, 4, 3, 3), np.float32), scheme, "x")
    slot = WeightSlot("x", "block.conv.weight", (4, 4, 3, 3), (1, 0, 2, 3), (4, 4, 3, 3))
    with pytest.raises(ExportError, match=r"weight 'block.conv.weight' with its axes as \(1, 0, 2, 3\)"):
        pack(slot, codes, scheme, [], lambda name, array, kind: None)


def test_what_the_runtime_does_not_execute_is_refused_with_the_list(shop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedPrecision, match="'ort' does not run vae_decoder at 'w3c_afp'") as caught:
        built(shop, "vae_decoder", Plan("w8c_afp", (("decoder.conv_in", "w3c_afp"),)))
    assert "w4g64_afp" in caught.value.hint


def eight_bits(x: Any) -> Any:
    """What `DynamicQuantizeLinear` (ONNX opset 11) leaves of a tensor: uint8 over its range, zero exact."""
    import torch

    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-low / scale).clamp(0, 255)
    return (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale


@pytest.mark.parametrize("component", ["text_encoder", "vae_decoder"])
def test_activations_of_eight_bits_are_rounded_once_a_layer_and_summed_exactly(component: str, shop: Workshop) -> None:
    import torch

    plan, feeds = Plan("w8c_a8"), shop.feeds(component)
    model, source = built(shop, component, plan), shop.sources[component]
    module = modules.load(source)
    round_weights(module, StoredWeights(source, plan, quantized_weights(source, plan, shop.run)))
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, inputs: (eight_bits(inputs[0]),))
    with torch.inference_mode():
        expected = module(*(torch.from_numpy(array) for array in feeds.values())).numpy()
    for form in (model.files, model.forms["ort"]):
        with OrtTarget().open(replace(model, files=form), threads=1) as session:
            # A sum that differs in its last bit may round to the next of 255 steps, and the decoder's 28 convolutions
            # in a row carry that on. Without any emulation it is 34.5 and 30.8 dB.
            assert snr_db(expected, output(session, feeds)) > (45 if component == "text_encoder" else 36)
    graph = onnx.load(str(model.folder / model.files[0]), load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["DynamicQuantizeLinear"] <= kinds["ConvInteger"] + kinds["MatMulInteger"]
    assert not kinds["Conv"] + kinds["Gemm"]


@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul"])
def test_one_product_of_integers_is_exact(kind: str) -> None:
    import torch
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(5)
    x = generator.standard_normal((1, 6, 9, 9) if kind == "Conv" else (5, 6), dtype=np.float32) + 0.7
    weight = generator.standard_normal((4, 6, 3, 3) if kind == "Conv" else (4, 6), dtype=np.float32)
    bias = None if kind == "MatMul" else generator.standard_normal(4, dtype=np.float32)
    codes = round_to_nearest(weight, parse_scheme("w8c_a8"), "w")
    rounded = eight_bits(torch.from_numpy(x))
    values = torch.from_numpy(codes.dequantised())
    wanted_bias = None if bias is None else torch.from_numpy(bias)
    if kind == "Conv":
        expected = torch.nn.functional.conv2d(rounded, values, wanted_bias, stride=2, padding=1)
    else:
        expected = torch.nn.functional.linear(rounded, values, wanted_bias)
    shapes: dict[str, dict[str, Any]] = {"Conv": {"strides": [2, 2], "pads": [1, 1, 1, 1]}, "Gemm": {"transB": 1}}
    names = ["x", "w", *(["b"] if bias is not None else [])]
    node = helper.make_node(kind, names, ["y"], "product", **shapes.get(kind, {}))
    constants = [numpy_helper.from_array(weight, "w")]
    constants += [numpy_helper.from_array(bias, "b")] if bias is not None else []
    floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph([node], "one", floats[:1], floats[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    permute = (1, 0) if kind == "MatMul" else None
    shape = tuple(weight.T.shape) if permute else weight.shape
    slot = WeightSlot("w", "w", weight.shape, permute, shape)

    def store(name: str, array: Array, dtype: str) -> Any:
        return helper.make_tensor(
            name, getattr(TensorProto, dtype), array.shape, np.ascontiguousarray(array).tobytes(), raw=True
        )

    apply(model, {"w": pack(slot, codes, parse_scheme("w8c_a8"), [(model.graph.node[0], 1)], store)})
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert snr_db(expected.numpy(), session.run(None, {"x": x})[0]) > 110


def over(x: Any, limits: tuple[float, float]) -> Any:
    """What uint8 over `limits` leaves of a tensor."""
    import torch

    scale, zero = (float(value) for value in scale_of(limits))
    return (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale


def test_static_activations_are_rounded_over_the_calibrated_ranges(shop: Workshop, tmp_path: Path) -> None:
    import torch

    component = "text_encoder"
    feeds, source = shop.feeds(component), shop.sources[component]
    np.savez(tmp_path / f"{component}-000.npz", allow_pickle=False, **{f"feed.{n}": a for n, a in feeds.items()})
    found = layer_ranges(source, Samples((tmp_path,), ("own",)), "minmax", shop.run)
    plan = replace(Plan("w8c_a8"), ranges=found)
    model = built(shop, component, plan)
    module = modules.load(source)
    round_weights(module, StoredWeights(source, plan, quantized_weights(source, plan, shop.run)))
    entering = found.read("input")
    bare: Any = module.m
    for path, layer in bare.named_modules():
        if path in entering:
            layer.register_forward_pre_hook(lambda _, inputs, r=entering[path]: (over(inputs[0], r),))
    with torch.inference_mode():
        expected = module(*(torch.from_numpy(array) for array in feeds.values())).numpy()
    for form in (model.files, model.forms["ort"]):
        with OrtTarget().open(replace(model, files=form), threads=1) as session:
            # as with dynamic ones: a sum that differs in its last bit may round to the next step
            assert snr_db(expected, output(session, feeds)) > 45
    graph = onnx.load(str(model.folder / model.files[0]), load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert not kinds["DynamicQuantizeLinear"] + kinds["ConvInteger"] + kinds["MatMulInteger"]
    assert kinds["MatMulIntegerToFloat"] > 3
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used
    assert "static" in model.notes[0]


def test_a_bias_beyond_32_bits_is_refused_by_name() -> None:
    from onnx import helper

    scheme = parse_scheme("w8c_a8")
    codes = round_to_nearest(np.full((4, 4, 3, 3), 1e-9, np.float32), scheme, "x")
    slot = WeightSlot("x", "block.conv.weight", (4, 4, 3, 3), None, (4, 4, 3, 3))
    node = helper.make_node("Conv", ["in", "x", "b"], ["out"], "conv")

    def store(name: str, array: Array, kind: str) -> Any:
        return helper.make_tensor(name, 1, [1], [0.0])

    with pytest.raises(ExportError, match=r"the bias of 'block\.conv\.weight' does not fit 32 bits"):
        static_products(slot, codes, (-1, 1), (-1, 1), [(node, 1)], store, lambda name: np.ones(4, np.float32))


def test_a_static_convolution_is_exact_to_a_step_of_its_output_and_runs_on_integers(tmp_path: Path) -> None:
    import torch
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(5)
    x = generator.standard_normal((1, 6, 9, 9), dtype=np.float32) + 0.7
    weight = generator.standard_normal((4, 6, 3, 3), dtype=np.float32)
    bias = generator.standard_normal(4, dtype=np.float32)
    codes = round_to_nearest(weight, parse_scheme("w8c_a8"), "w")
    entering, leaving = (-2.5, 4.0), (-30.0, 25.0)  # some of the inputs lie outside
    values = torch.from_numpy(codes.dequantised())
    sums = torch.nn.functional.conv2d(
        over(torch.from_numpy(x), entering), values, torch.from_numpy(bias), stride=2, padding=1
    )
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], "product", strides=[2, 2], pads=[1, 1, 1, 1])
    constants = [numpy_helper.from_array(array, name) for name, array in (("w", weight), ("b", bias))]
    floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph([node], "one", floats[:1], floats[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    slot = WeightSlot("w", "w", weight.shape, None, weight.shape)

    def store(name: str, array: Array, dtype: str) -> Any:
        raw = np.ascontiguousarray(array).tobytes()
        return helper.make_tensor(name, getattr(TensorProto, dtype), array.shape, raw, raw=True)

    uses = [(model.graph.node[0], 1)]
    apply(model, {"w": static_products(slot, codes, entering, leaving, uses, store, lambda name: bias)})
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "seen.onnx")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    found = session.run(None, {"x": x})[0]
    step = float(scale_of(leaving)[0])
    assert np.abs(found - sums.numpy()).max() <= 0.501 * step
    seen = {node.op_type for node in onnx.load(str(tmp_path / "seen.onnx")).graph.node}
    assert "QLinearConv" in seen
    assert not seen & {"Conv", "FusedConv"}
