"""A ControlNet beside a checkpoint: found in every layout, and refused from headers where it is another UNet's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusette.checkpoints import network
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.weights import Weights
from diffusette.convert.recipe import parameters_of, parse_recipe
from diffusette.export import contract, modules
from diffusette.stages.artifacts import Checkpoint, Companions
from diffusette.stages.errors import CheckpointError
from safetensors.torch import save_file

from ..adapters import ATTENTION, random_lora
from ..kinds import kind_pipeline, tiny_controlnet
from ..ldm import ldm_controlnet, ldm_tensors, original_pipeline, write_ldm
from ..models import edit_json
from .opening import TOKENIZER

SIZE = (64, 64)
Opened = Callable[[Path], Checkpoint]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet for the kind sd1. Read only."""
    place = tmp_path_factory.mktemp("controlnets") / "sd1"
    tiny_controlnet("sd1").save_pretrained(place)
    return place


@pytest.fixture
def opened(kind_folder: Callable[[str], Path]) -> Opened:
    """Opens the kind sd1 with the ControlNet at a path, from headers."""
    return lambda place: open_checkpoint(kind_folder("sd1"), companions=Companions(controlnet=place), survey=False)


def copied(folder: Path, into: Path, change: Mapping[str, Any]) -> Path:
    """`folder` with another configuration, its weights linked."""
    into.mkdir()
    (into / "diffusion_pytorch_model.safetensors").symlink_to(folder / "diffusion_pytorch_model.safetensors")
    (into / "config.json").write_text((folder / "config.json").read_text())
    edit_json(into / "config.json", dict(change))
    return into


def assert_weights_are(checkpoint: Checkpoint, module: Any) -> None:
    weights, state = Weights(checkpoint.components["controlnet"]), module.state_dict()
    assert set(weights.names()) == set(state)
    for name, value in state.items():
        assert torch.equal(torch.from_numpy(weights.read(name)), value), name


def test_a_folder_becomes_a_component_and_the_unet_takes_what_it_gives(opened: Opened, folder: Path) -> None:
    checkpoint = opened(folder)
    assert_weights_are(checkpoint, tiny_controlnet("sd1"))
    controlnet, unet = checkpoint.components["controlnet"], checkpoint.components["unet"]
    given = {spec.name: spec.shape for spec in contract.output_specs(controlnet, (64, 96))}
    taken = {spec.name: spec.shape for spec in contract.input_specs(unet, (64, 96))}
    pairs = contract.residual_inputs(tuple(given))
    assert len(pairs) == 5
    assert {taken[pairs[name]] for name in given} == set(given.values())
    assert all(taken[pairs[name]] == shape for name, shape in given.items())
    wanted = ("sample", "timestep", "encoder_hidden_states", "controlnet_cond")
    assert tuple(spec.name for spec in contract.input_specs(controlnet, (64, 96))) == wanted
    assert {"controlnet/config.json", "controlnet/diffusion_pytorch_model.safetensors"} <= set(checkpoint.sources)


def test_without_one_the_unet_is_as_it_was(kind_folder: Callable[[str], Path]) -> None:
    unet = open_checkpoint(kind_folder("sd1"), survey=False).components["unet"]
    names = [spec.name for spec in contract.input_specs(unet, (64, 64))]
    assert names == ["sample", "timestep", "encoder_hidden_states"]


def test_odd_latents_are_halved_as_the_network_halves_them(opened: Opened, folder: Path) -> None:
    source, size = opened(folder).components["controlnet"], (72, 40)  # 9 x 5 latents
    specs = contract.input_specs(source, size)
    with torch.no_grad():
        found = modules.load(source)(*(torch.zeros(spec.shape) for spec in specs))
    assert [tuple(each.shape) for each in found] == [spec.shape for spec in contract.output_specs(source, size)]


def test_a_pipeline_that_was_saved_with_one_needs_no_option(tmp_path: Path) -> None:
    controlnet = tiny_controlnet("sd1")
    kind_pipeline("sd1", "StableDiffusionControlNetPipeline", controlnet=controlnet).save_pretrained(tmp_path / "whole")
    checkpoint = open_checkpoint(tmp_path / "whole", survey=False)
    assert checkpoint.family == "sd1"
    assert_weights_are(checkpoint, controlnet)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("form", ["original", "without prefix", "diffusers"])
def test_one_file_is_named_and_configured_after_the_unet(kind: str, form: str, tmp_path: Path) -> None:
    import diffusers

    whole = original_pipeline(kind)
    controlnet: Any = diffusers.ControlNetModel  # untyped
    controlnet = controlnet.from_unet(whole.unet, conditioning_embedding_out_channels=(16, 16, 24, 32))
    tensors = {
        "original": lambda: ldm_controlnet(controlnet),
        "without prefix": lambda: ldm_controlnet(controlnet, prefix=""),
        "diffusers": controlnet.state_dict,
    }[form]()
    file = write_ldm(tmp_path / "control_test.safetensors", tensors)
    base = write_ldm(tmp_path / "model.safetensors", ldm_tensors(whole))
    prediction = "epsilon" if kind == "sd2" else None
    given = Companions(controlnet=file, tokenizer=TOKENIZER, prediction=prediction)
    checkpoint = open_checkpoint(base, companions=given, survey=False)
    assert_weights_are(checkpoint, controlnet)
    config = checkpoint.components["controlnet"].config
    built = network.build(checkpoint.components["controlnet"])
    assert {name: tuple(p.shape) for name, p in built.named_parameters()} == {
        name: tuple(value.shape) for name, value in controlnet.state_dict().items()
    }
    for key in (
        "attention_head_dim",
        "use_linear_projection",
        "flip_sin_to_cos",
        "conditioning_embedding_out_channels",
    ):
        stated = controlnet.config[key]
        assert config[key] == (list(stated) if isinstance(stated, tuple) else stated), key
    assert any("states no configuration" in remark for remark in checkpoint.remarks)


def test_the_original_pickle_opens_with_the_rest_of_its_model_beside_it(
    opened: Opened, tmp_path: Path, kind_folder: Callable[[str], Path]
) -> None:
    tensors = ldm_controlnet(tiny_controlnet("sd1"))
    file = write_ldm(tmp_path / "control_test.pth", tensors | {"model.diffusion_model.out.2.bias": torch.zeros(4)})
    assert_weights_are(opened(file), tiny_controlnet("sd1"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "is 'UNet2DConditionModel', not 'ControlNetModel'"),
        ({"_class_name": "ControlNetUnionModel"}, "is 'ControlNetUnionModel', not 'ControlNetModel'"),
        ({"cross_attention_dim": 1024}, "cross_attention_dim is 1024, that of the UNet is 32"),
        ({"block_out_channels": [16, 32, 32]}, r"block_out_channels is \[16, 32, 32\], that of the UNet is"),
        ({"layers_per_block": 2}, r"layers_per_block is \[2, 2\], that of the UNet is \[1, 1\]"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time', that of the UNet is None"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos is False"),
        ({"in_channels": 16}, "takes latents of 16 channels, the UNet draws 4"),
        ({"global_pool_conditions": True}, "it pools what it adds"),
        ({"controlnet_conditioning_channel_order": "bgr"}, "it takes pictures as BGR"),
        ({"conditioning_channels": 4}, "it takes no RGB picture"),
        ({"conditioning_embedding_out_channels": [4, 8]}, "does not bring a picture to the size of latents"),
        ({"block_out_channels": None}, "a list is needed"),
        ({"layers_per_block": 1.5}, "'layers_per_block' is 1.5, a number of layers is needed"),
    ],
)
def test_another_unets_controlnet_is_refused_from_its_configuration(
    change: dict[str, Any], message: str, opened: Opened, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as refusal:
        opened(copied(folder, tmp_path / "other", change))
    assert refusal.value.hint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lllite_unet_down_blocks_1.conditioning1.0.weight", "a ControlNet-LLLite"),
        ("lora_controlnet", "a Control-LoRA"),
        ("adapter.body.0.in_conv.weight", "a T2I-Adapter"),
        ("model.diffusion_model.out.2.weight", "a checkpoint without a ControlNet in it"),
        ("lora_unet_mid_block.lora_up.weight", "a LoRA, which is given with --adapter"),
        ("encoder.conv_in.weight", "no tensor of a ControlNet in it"),
    ],
)
def test_what_is_taken_for_a_controlnet_is_refused_by_its_name(
    name: str, message: str, opened: Opened, tmp_path: Path
) -> None:
    save_file({name: torch.zeros(2, 2)}, tmp_path / "control.safetensors")
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path / "control.safetensors")


def test_a_file_for_another_unet_is_refused_with_what_does_not_fit(opened: Opened, tmp_path: Path) -> None:
    for kind, message in (("sdxl", "cross_attention_dim is 56, that of the UNet is 32"), ("lcm", "")):
        file = write_ldm(tmp_path / f"{kind}.safetensors", ldm_controlnet(tiny_controlnet(kind)))
        if not message:  # guidance as an input is the UNet's own affair
            assert "controlnet" in opened(file).components
            continue
        with pytest.raises(CheckpointError, match=message):
            opened(file)
    tensors = ldm_controlnet(tiny_controlnet("sd1"))
    tensors["control_model.zero_convs.1.0.weight"] = torch.zeros(24, 16, 1, 1)
    del tensors["control_model.middle_block_out.0.bias"]
    with pytest.raises(CheckpointError, match="lacks what diffusers calls 'controlnet_mid_block"):
        opened(write_ldm(tmp_path / "cut.safetensors", tensors))
    tensors["control_model.middle_block_out.0.bias"] = torch.zeros(32)
    with pytest.raises(CheckpointError, match=r"1 of another shape: controlnet_down_blocks\.1\.weight"):
        opened(write_ldm(tmp_path / "reshaped.safetensors", tensors))


def test_adapters_change_the_unet_and_not_the_controlnet(
    kind_folder: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    unet = kind_pipeline("sd1").unet
    save_file(random_lora(unet, ATTENTION, "lora_unet_"), tmp_path / "style.safetensors")
    given = Companions(controlnet=folder, adapters=((tmp_path / "style.safetensors", 1.0),))
    checkpoint = open_checkpoint(kind_folder("sd1"), companions=given, survey=False)
    assert checkpoint.components["unet"].adapted
    assert not checkpoint.components["controlnet"].adapted
    assert any(
        spec.name.startswith("mid_block_add") for spec in contract.input_specs(checkpoint.components["unet"], SIZE)
    )


def test_rules_of_recipes_reach_it_by_its_name(opened: Opened, folder: Path) -> None:
    rule = '[[quantize.rules]]\nmatch = "controlnet/controlnet_cond_embedding.*"\nscheme = "fp32"\n'
    recipe = parse_recipe(f'schema = 1\n[quantize]\nprecision = "w8c_afp"\n{rule}', "rules")
    plans = recipe.plans(parameters_of(opened(folder)))
    assert plans["controlnet"].label == "w8c_afp+fp32"
    assert plans["unet"].label == "w8c_afp"


def test_a_place_without_one_is_refused(opened: Opened, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        opened(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json in it"):
        opened(tmp_path / "empty")


def test_a_pipeline_with_several_is_refused(kind_folder: Callable[[str], Path], tmp_path: Path) -> None:
    index = json.loads((kind_folder("sd1") / "model_index.json").read_text())
    for part in kind_folder("sd1").iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "model_index.json").unlink()
    index["controlnet"] = ["diffusers", "MultiControlNetModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="a pipeline with several ControlNets"):
        open_checkpoint(tmp_path, survey=False)
