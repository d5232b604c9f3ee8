"""The ncnn target on the embedded demo checkpoint, against PyTorch."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from diffusette.checkpoints.families.sd1 import SD1
from diffusette.export import modules
from diffusette.quantize.plan import Plan
from diffusette.runtimes.ncnn import param, pnnx
from diffusette.runtimes.ncnn.layout import PARAMETER
from diffusette.runtimes.ncnn.lower import lowered, native_inputs
from diffusette.runtimes.ncnn.session import NcnnSession
from diffusette.runtimes.ncnn.trace import small_sizes, trace_of
from diffusette.runtimes.ncnn.write import WriteNcnn
from diffusette.stages.artifacts import ComponentSource
from diffusette.stages.errors import FeedError, ModelError, UnsupportedPrecision
from safetensors.numpy import load_file, save_file

from .workshop import SIZE, Array, Workshop, ncnn_output, snr_db, torch_output

# torch.jit is deprecated, and the modules branch on sizes that are fixed here
pytestmark = pytest.mark.filterwarnings("ignore")

COMPONENTS: Final = tuple(SD1.components)  # of the demo
# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", COMPONENTS)
def test_fp32_model_computes_what_pytorch_computes(component: str, workshop: Workshop) -> None:
    feeds = workshop.feeds(component)
    output = ncnn_output(workshop.model(component, "fp32"), workshop.native(component, feeds))
    assert snr_db(torch_output(workshop.module(component), feeds), output) >= 100


@pytest.mark.parametrize("component", COMPONENTS)
def test_fp16_file_costs_the_rounding_of_its_weights_and_nothing_else(component: str, workshop: Workshop) -> None:
    import torch

    feeds = workshop.feeds(component)
    model = workshop.model(component, "fp16")
    output = ncnn_output(model, workshop.native(component, feeds))
    assert snr_db(torch_output(workshop.module(component), feeds), output) >= 45

    rounded = modules.load(workshop.sources[component])
    halved = [
        blob.name for blob in workshop.traced(component).blobs() if blob.kind == PARAMETER and len(blob.shape) > 1
    ]
    with torch.no_grad():
        for name in halved:
            parameter = rounded.get_parameter(f"m.{name}")
            parameter.copy_(parameter.half().float())
    assert snr_db(torch_output(rounded, feeds), output) >= 90
    assert model.bits_per_weight < 17


@pytest.mark.parametrize(
    ("component", "size", "shape"),
    [
        ("unet", (128, 96), (1, 4, 16, 12)),
        ("unet", (72, 104), (1, 4, 9, 13)),  # no level divides by two
        ("vae_decoder", (128, 96), (1, 3, 128, 96)),
        ("vae_encoder", (128, 96), (1, 8, 16, 12)),
    ],
)
def test_other_picture_sizes_are_as_exact(
    component: str, size: tuple[int, int], shape: tuple[int, ...], workshop: Workshop
) -> None:
    feeds = workshop.feeds(component, size)
    output = ncnn_output(workshop.model(component, "fp32", size), workshop.native(component, feeds, size))
    assert output.shape == shape
    assert snr_db(torch_output(workshop.module(component), feeds), output) >= 100


# --- fingerprints tell the truth --------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", COMPONENTS)
def test_file_is_the_one_that_pnnx_writes_from_the_real_weights(
    component: str, workshop: Workshop, tmp_path: Path
) -> None:
    """Fingerprints could hide what pnnx does with real values only. So here it gets them, at the full size."""
    import torch

    source = workshop.sources[component]
    module, fingerprints = lowered(source)
    real = workshop.module(component)
    for name in fingerprints.shapes:
        owner, _, leaf = f"m.{name}".rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = real.get_parameter(f"m.{name}")
    inputs = native_inputs(source, SIZE)
    examples = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in inputs)
    trace: Any = torch.jit.trace  # untyped in torch
    with torch.no_grad():
        trace(module, examples, check_trace=False).save(str(tmp_path / "real.pt"))
    graph, weights = pnnx.convert(tmp_path / "real.pt", [inputs], tmp_path)

    ours = workshop.model(component, "fp32")
    assert (ours.folder / ours.files[1]).read_bytes() == weights.read_bytes()
    written = param.parse((ours.folder / ours.files[0]).read_text())
    assert [layer.type for layer in written] == [layer.type for layer in param.parse(graph.read_text())]


def test_picture_sizes_share_a_trace_unless_they_halve_differently(workshop: Workshop) -> None:
    unet = workshop.sources["unet"]  # three levels: 32 pixels are one at the deepest
    assert small_sizes(unet, (512, 768)) == ((64, 96), (96, 128))
    assert trace_of(unet, (512, 768)).key() == trace_of(unet, SIZE).key()
    assert trace_of(unet, (520, 768)).key() != trace_of(unet, SIZE).key()
    text_encoder = workshop.sources["text_encoder"]
    assert trace_of(text_encoder, (520, 768)).key() == trace_of(text_encoder, SIZE).key()


def test_fine_tunes_share_a_trace(workshop: Workshop) -> None:
    source = workshop.sources["unet"]
    tuned = dataclasses.replace(
        source, digest="another", config={**source.config, "_name_or_path": "x", "dtype": "float16"}
    )
    wider = dataclasses.replace(source, config={**source.config, "cross_attention_dim": 96})
    assert trace_of(tuned, SIZE).key() == trace_of(source, SIZE).key()
    assert trace_of(wider, SIZE).key() != trace_of(source, SIZE).key()


# --- build ------------------------------------------------------------------------------------------------------------


def test_build_makes_files_and_inputs_that_an_app_can_read(workshop: Workshop) -> None:
    model = workshop.model("unet", "fp32")
    assert model.files == ("unet.param", "unet.bin")
    assert [(spec.name, spec.dtype, spec.shape) for spec in model.inputs] == [
        ("sample", "float32", (1, 4, 8, 8)),
        ("timestep_embedding", "float32", (1, 48)),
        ("encoder_hidden_states", "float32", (1, 77, 128)),
    ]
    layers = param.parse((model.folder / "unet.param").read_text())
    assert {layer.name for layer in layers if layer.type == "Input"} == {spec.name for spec in model.inputs}
    assert layers[-1].outputs == ("out_sample",)
    assert sorted(file.name for file in model.folder.iterdir()) == ["unet.bin", "unet.param"]


def test_trace_leaves_no_copy_of_the_stub_weights(workshop: Workshop) -> None:
    folder = workshop.traced("unet").folder
    assert sorted(file.name for file in folder.iterdir()) == ["layout.json", "literals.bin", "model.param"]


def test_text_encoder_takes_int32_ids(workshop: Workshop) -> None:
    (spec,) = workshop.model("text_encoder", "fp32").inputs
    assert (spec.name, spec.dtype) == ("input_ids", "int32")


def test_unknown_precision_is_refused_with_the_list(workshop: Workshop) -> None:
    with pytest.raises(UnsupportedPrecision, match="w3c_afp") as caught:
        workshop.model("unet", "w3c_afp")
    assert "fp16" in caught.value.hint


def test_weight_beyond_float16_is_refused_by_name(workshop: Workshop, tmp_path: Path) -> None:
    source = workshop.sources["text_encoder"]
    name, value = "encoder.layers.1.mlp.fc1.weight", 70000.0
    tensors = load_file(source.files[0])
    stored = next(key for key in tensors if key.endswith(name))
    tensors[stored][3, 5] = value
    save_file(tensors, tmp_path / "model.safetensors")
    large = dataclasses.replace(source, files=(tmp_path / "model.safetensors",), digest="large")
    traced = workshop.traced("text_encoder")
    with pytest.raises(ModelError, match=rf"text_encoder/{name} holds 7e\+04"):
        workshop.run(WriteNcnn(traced, large, SIZE, Plan("fp16")))
    assert workshop.run(WriteNcnn(traced, large, SIZE, Plan("fp32"))).precision == "fp32"


def test_checkpoint_of_another_shape_is_refused(workshop: Workshop) -> None:
    other: ComponentSource = workshop.sources["vae_encoder"]
    with pytest.raises(ModelError, match="missing"):
        workshop.run(WriteNcnn(workshop.traced("vae_decoder"), other, SIZE, Plan("fp32")))


# --- session ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        lambda feeds: {**feeds, "latent_sample": np.zeros((1, 4, 16, 16), np.float32)},
        lambda feeds: {**feeds, "latent_sample": np.zeros((4, 8, 8), np.float32)},
        lambda feeds: {**feeds, "latent_sample": np.zeros((1, 4, 8, 8), np.float64)},
        lambda feeds: {**feeds, "latent_sample": np.full((1, 4, 8, 8), np.nan, np.float32)},
        lambda feeds: {**feeds, "more": np.zeros(1, np.float32)},
        lambda feeds: {},
    ],
    ids=["size", "rank", "dtype", "NaN", "unknown name", "nothing"],
)
def test_wrong_feeds_never_reach_ncnn(
    spoil: Callable[[dict[str, Array]], dict[str, Array]], workshop: Workshop
) -> None:
    with NcnnSession(workshop.model("vae_decoder", "fp32"), threads=1) as session, pytest.raises(FeedError):
        session.run(spoil(workshop.feeds("vae_decoder")))


def test_order_in_memory_does_not_matter(workshop: Workshop) -> None:
    feeds = workshop.feeds("vae_decoder")
    turned = {name: np.asfortranarray(array) for name, array in feeds.items()}
    model = workshop.model("vae_decoder", "fp32")
    assert np.array_equal(ncnn_output(model, feeds), ncnn_output(model, turned))


def test_runs_of_one_session_are_equal(workshop: Workshop) -> None:
    feeds = workshop.native("unet", workshop.feeds("unet"))
    with NcnnSession(workshop.model("unet", "fp32"), threads=1) as session:
        first, second = (session.run(feeds)["out_sample"] for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "gone", "another model's", "no graph"])
def test_damaged_files_are_refused_and_do_not_crash(damage: str, workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("vae_decoder", "fp32")
    copy = dataclasses.replace(model, folder=Path(shutil.copytree(model.folder, tmp_path / "copy")))
    weights = copy.folder / "vae_decoder.bin"
    data = weights.read_bytes()
    if damage == "gone":
        weights.unlink()
    elif damage == "no graph":
        (copy.folder / "vae_decoder.param").write_bytes(b"\x00not a graph")
    elif damage == "another model's":
        other = workshop.model("vae_encoder", "fp32")
        shutil.copyfile(other.folder / "vae_encoder.bin", weights)
    else:
        weights.write_bytes({"cut": data[: len(data) // 2], "longer": data + bytes(16), "empty": b""}[damage])
    with pytest.raises(ModelError):
        NcnnSession(copy, threads=1)


def test_closed_session_refuses_to_run(workshop: Workshop) -> None:
    session = NcnnSession(workshop.model("vae_decoder", "fp32"), threads=1)
    session.close()
    session.close()
    with pytest.raises(ModelError, match="closed"):
        session.run(workshop.feeds("vae_decoder"))
