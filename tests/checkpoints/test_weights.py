from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.weights import Weights
from diffusette.stages.errors import CheckpointError
from numpy.typing import NDArray

from ..models import (
    TEXT_WEIGHTS,
    UNET_WEIGHTS,
    VAE_WEIGHTS,
    Arrays,
    edit_tensors,
    raw_safetensors,
    rename_tensors,
    tiny_pipeline,
    write_tiny_sd1,
)

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
HALVES = {"vae_decoder": ("decoder.", "post_quant_conv."), "vae_encoder": ("encoder.", "quant_conv.")}
LINEAR_IN_VAE = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")


@pytest.fixture(scope="module")
def expected() -> dict[str, Arrays]:
    """What PyTorch's own modules hold: component -> state_dict without buffers."""
    pipeline = tiny_pipeline()
    modules = {"text_encoder": pipeline.text_encoder, "unet": pipeline.unet}
    modules |= dict.fromkeys(HALVES, pipeline.vae)
    return {
        component: {
            name: parameter.detach().numpy()
            for name, parameter in module.named_parameters()
            if name.startswith(HALVES.get(component, ""))
        }
        for component, module in modules.items()
    }


def weights_of(folder: Path) -> dict[str, Weights]:
    return {name: Weights(source) for name, source in open_checkpoint(folder).components.items()}


def assert_equal(weights: dict[str, Weights], expected: dict[str, Arrays]) -> None:
    for component, parameters in expected.items():
        found = weights[component]
        found.check({name: values.shape for name, values in parameters.items()})
        assert set(found.names()) == set(parameters)
        for name, values in parameters.items():
            read = found.read(name)
            assert read.flags.c_contiguous
            assert found.spec(name)[1] == read.shape == values.shape
            np.testing.assert_array_equal(read, values)


def test_names_and_values_are_those_of_the_state_dict(tiny_folder: Path, expected: dict[str, Arrays]) -> None:
    assert_equal(weights_of(tiny_folder), expected)


def test_parameters_of_both_halves_add_up_to_the_autoencoder(tiny_folder: Path) -> None:
    components = open_checkpoint(tiny_folder).components
    total = sum(parameter.numel() for parameter in tiny_pipeline().vae.parameters())
    assert components["vae_decoder"].parameters + components["vae_encoder"].parameters == total


def test_what_transformers_4_saved_is_read_under_todays_names(tiny_copy: Path, expected: dict[str, Arrays]) -> None:
    def as_version_4(tensors: Arrays) -> Arrays:
        old = {f"text_model.{name.removeprefix('text_model.')}": values for name, values in tensors.items()}
        return old | {"text_model.embeddings.position_ids": np.arange(77)[None]}

    edit_tensors(tiny_copy / TEXT_WEIGHTS, as_version_4)
    assert_equal(weights_of(tiny_copy), expected)


@pytest.mark.parametrize("as_convolution", [False, True])
def test_old_vae_attention_is_read_under_todays_names(
    as_convolution: bool, tiny_copy: Path, expected: dict[str, Arrays]
) -> None:
    old_names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def old(name: str) -> str:
        for today, before in old_names.items():
            name = name.replace(today, before) if ".attentions." in name else name
        return name

    def as_old(tensors: Arrays) -> Arrays:
        pointwise = {n: v[:, :, None, None] for n, v in tensors.items() if as_convolution and n.endswith(LINEAR_IN_VAE)}
        return {old(name): values for name, values in (tensors | pointwise).items()}

    edit_tensors(tiny_copy / VAE_WEIGHTS, as_old)
    assert_equal(weights_of(tiny_copy), expected)


def test_two_spellings_of_one_tensor_are_refused(tiny_copy: Path) -> None:
    name = "final_layer_norm.weight"
    edit_tensors(
        tiny_copy / TEXT_WEIGHTS, lambda t: t | {name: np.ones(32, "f4"), f"text_model.{name}": np.ones(32, "f4")}
    )
    with pytest.raises(CheckpointError, match=f"are both '{name}'"):
        open_checkpoint(tiny_copy)


def test_shards_are_read_as_one(tmp_path: Path, expected: dict[str, Arrays]) -> None:
    folder = write_tiny_sd1(tmp_path / "sharded", max_shard_size="100KB")
    assert (folder / "unet/diffusion_pytorch_model.safetensors.index.json").is_file()
    assert len(open_checkpoint(folder).components["unet"].files) > 1
    assert_equal(weights_of(folder), expected)


def test_a_variant_serves_when_the_full_precision_file_is_absent(tmp_path: Path, tiny_folder: Path) -> None:
    pipeline = tiny_pipeline().to("cpu")
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.half()
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    checkpoint = open_checkpoint(tmp_path / "half")
    full = weights_of(tiny_folder)
    for name, source in checkpoint.components.items():
        weights = Weights(source)
        assert source.dtype == "float16"
        for tensor in weights.names():
            assert weights.spec(tensor)[0] == "float16"
            np.testing.assert_array_equal(weights.read(tensor), full[name].read(tensor).astype(np.float16))


def test_the_full_precision_file_wins_over_a_variant_beside_it(tiny_copy: Path) -> None:
    file = tiny_copy / UNET_WEIGHTS
    shutil.copyfile(file, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert open_checkpoint(tiny_copy).components["unet"].files == (file,)


def test_bfloat16_widens_to_float32(tiny_copy: Path, tiny_folder: Path) -> None:
    def write_bf16(tensors: Arrays) -> Arrays:
        header: dict[str, Any] = {}
        data = b""
        for name, values in tensors.items():
            stored = values.astype(ml_dtypes.bfloat16).tobytes()
            offsets = [len(data), len(data) + len(stored)]
            header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": offsets}
            data += stored
        raw_safetensors(tiny_copy / "vae/bf16", header, data)
        return tensors

    edit_tensors(tiny_copy / VAE_WEIGHTS, write_bf16)
    (tiny_copy / "vae/bf16").replace(tiny_copy / VAE_WEIGHTS)
    weights = weights_of(tiny_copy)["vae_decoder"]
    name = "decoder.conv_in.weight"
    full: NDArray[np.float32] = weights_of(tiny_folder)["vae_decoder"].read(name)
    assert weights.spec(name)[0] == "bfloat16"
    assert weights.read(name).dtype == np.float32
    np.testing.assert_array_equal(weights.read(name), full.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_check_lists_what_is_missing_unexpected_and_of_another_shape(tiny_folder: Path) -> None:
    weights = weights_of(tiny_folder)["unet"]
    expected = {name: weights.spec(name)[1] for name in weights.names()}
    weights.check(expected)
    del expected["conv_in.bias"]
    expected["conv_in.weight"] = (16, 9, 3, 3)
    expected |= {f"extra.{number}": (1,) for number in range(7)}
    with pytest.raises(CheckpointError) as refusal:
        weights.check(expected)
    lines = refusal.value.what.splitlines()
    assert lines[1] == "  7 missing: extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more"
    assert lines[2] == "  1 unexpected: conv_in.bias"
    assert lines[3] == "  1 of another shape: conv_in.weight is [16, 4, 3, 3], the config asks for [16, 9, 3, 3]"


def test_an_unknown_name_is_an_error(tiny_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="unet: no tensor named 'conv_inn'"):
        weights_of(tiny_folder)["unet"].read("conv_inn")


def test_quantized_weights_are_refused(tiny_copy: Path) -> None:
    edit_tensors(tiny_copy / UNET_WEIGHTS, lambda t: t | {"conv_in.weight": t["conv_in.weight"].astype(np.int8)})
    with pytest.raises(CheckpointError, match=r"'conv_in\.weight' is stored as int8"):
        open_checkpoint(tiny_copy)


def test_a_half_without_tensors_is_named(tiny_copy: Path) -> None:
    rename_tensors(tiny_copy / VAE_WEIGHTS, lambda name: "x" + name if name.startswith(("encoder", "quant")) else name)
    with pytest.raises(CheckpointError, match="no tensor of vae_encoder"):
        open_checkpoint(tiny_copy)
