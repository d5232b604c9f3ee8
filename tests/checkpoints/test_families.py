from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from diffusette.checkpoints.families import FAMILIES, Headers, get_family, recognise
from diffusette.checkpoints.families.unsupported import UNSUPPORTED
from diffusette.stages.artifacts import ROLES
from diffusette.stages.errors import CheckpointError

SD1_PARTS = {
    "text_encoder": "CLIPTextModel",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "scheduler": "PNDMScheduler",
    "tokenizer": "CLIPTokenizer",
}


def sd1(parts: dict[str, str] | None = None, pipeline: str = "StableDiffusionPipeline", **settings: Any) -> Headers:
    """SD1.5's headers, with more parts and with `part__key` settings changed."""
    configs: dict[str, dict[str, Any]] = {
        "unet": {"_class_name": "UNet2DConditionModel", "in_channels": 4, "cross_attention_dim": 768},
        "text_encoder": {"architectures": ["CLIPTextModel"], "hidden_size": 768, "hidden_act": "quick_gelu"},
        "vae": {"_class_name": "AutoencoderKL"},
        "scheduler": {"_class_name": "PNDMScheduler"},
    }
    for path, value in settings.items():
        part, _, key = path.partition("__")
        configs[part][key] = value
    return Headers(pipeline, SD1_PARTS | (parts or {}), configs)


def sd2(**settings: Any) -> Headers:
    """SD2.1's headers."""
    open_clip = {
        "text_encoder__hidden_size": 1024,
        "text_encoder__hidden_act": "gelu",
        "unet__cross_attention_dim": 1024,
    }
    return sd1(**{**open_clip, **settings})


def xl(**settings: Any) -> Headers:
    """SDXL's headers."""
    added = {
        "unet__addition_embed_type": "text_time",
        "unet__addition_time_embed_dim": 256,
        "unet__projection_class_embeddings_input_dim": 2816,
        "unet__cross_attention_dim": 2048,
    }
    parts = {"text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"}
    headers = sd1(parts, "StableDiffusionXLPipeline", **{**added, **settings})
    configs = {**headers.configs, "text_encoder_2": {"hidden_size": 1280, "hidden_act": "gelu"}}
    return Headers(headers.pipeline, headers.parts, configs)


def lone(*names: str, **config: Any) -> Headers:
    """One file with tensors of these names, or one model's folder with this config."""
    return Headers(configs={"": config} if config else {}, tensors={"": dict.fromkeys(names, (1,))} if names else {})


def pipeline(name: str, **parts: str) -> Headers:
    return Headers(name, parts, {part: {"_class_name": kind} for part, kind in parts.items()})


LDM = "model.diffusion_model.input_blocks.0.0.weight"
EXAMPLES: tuple[tuple[str, Headers], ...] = (
    ("a LoRA or LyCORIS adapter", lone("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight")),
    ("a LoRA or LyCORIS adapter", lone("unet.down_blocks.0.attentions.0.to_k.lora_A.weight")),
    (
        "a LoRA or LyCORIS adapter",
        lone("unet.down_blocks.0.attn1.processor.to_q_lora.down.weight", "x.lora.down.weight"),
    ),
    ("a LoRA or LyCORIS adapter", lone("text_model_encoder_layers_0_mlp_fc1.hada_w1_a")),
    ("a LoRA or LyCORIS adapter", lone("base_model.model.model.layers.0.q_proj.lora_B.default.weight")),
    ("a LoRA or LyCORIS adapter", lone(peft_type="LORA")),
    ("an IP-Adapter", lone("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight")),
    ("a textual inversion (an embedding of new words)", lone("emb_params")),
    ("a textual inversion (an embedding of new words)", lone("<cat-toy>")),
    ("a ControlNet alone", lone(_class_name="ControlNetModel")),
    ("a ControlNet alone", lone("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.x", "mid_block.x")),
    ("a ControlNet alone", lone("control_model.input_hint_block.0.weight")),
    ("a single-file SD3 checkpoint", lone("model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight")),
    ("a single-file Flux checkpoint", lone("double_blocks.0.img_attn.proj.weight")),
    ("a single-file video model", lone(LDM, "model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.weight")),
    ("a single-file video model", lone("model.diffusion_model.patchify_proj.weight")),
    ("a single-file video model", lone("head.modulation", "blocks.0.self_attn.q.weight")),
    ("a single-file diffusion transformer", lone("model.diffusion_model.double_layers.0.attn.w2q.weight")),
    ("a single-file diffusion transformer", lone("net.blocks.0.self_attn.q_proj.weight")),
    ("a single-file diffusion transformer", lone("x_embedder.proj.weight", "blocks.0.attn.qkv.weight")),
    ("Stable Diffusion 3", pipeline("StableDiffusion3Pipeline", transformer="SD3Transformer2DModel")),
    ("Flux", pipeline("FluxPipeline", transformer="FluxTransformer2DModel")),
    ("PixArt", pipeline("PixArtAlphaPipeline", transformer="PixArtTransformer2DModel")),
    ("DiT", pipeline("DiTPipeline", transformer="DiTTransformer2DModel")),
    ("a video model", pipeline("TextToVideoSDPipeline", unet="UNet3DConditionModel")),
    ("a video model", pipeline("StableVideoDiffusionPipeline", unet="UNetSpatioTemporalConditionModel")),
    ("a video model", pipeline("WanPipeline", transformer="WanTransformer3DModel")),
    ("a diffusion transformer", pipeline("SanaPipeline", transformer="SanaTransformer2DModel")),
    ("the Stable Diffusion XL refiner", xl(unet__cross_attention_dim=1280)),
    ("Kandinsky", pipeline("KandinskyV22Pipeline", unet="UNet2DConditionModel", movq="VQModel")),
    ("Stable Cascade or Würstchen", pipeline("StableCascadeDecoderPipeline", decoder="StableCascadeUNet")),
    ("DeepFloyd IF", pipeline("IFPipeline", text_encoder="T5EncoderModel", unet="UNet2DConditionModel")),
    (
        "a pipeline with several ControlNets, or one of another kind",
        sd1({"controlnet": "MultiControlNetModel"}, "StableDiffusionControlNetPipeline"),
    ),
    ("an InstructPix2Pix checkpoint", sd1(unet__in_channels=8)),
    ("a Stable Diffusion upscaler", sd1(unet__in_channels=7)),
    ("Stable Diffusion 2 depth-to-image", sd1({"depth_estimator": "DPTForDepthEstimation"}, unet__in_channels=5)),
    ("a language model", lone(architectures=["LlamaForCausalLM"])),
    ("a language model", lone("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight")),
    ("a UNet alone", lone(_class_name="UNet2DConditionModel")),
    ("a UNet alone", lone("down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight")),
    ("a VAE alone", lone("decoder.conv_in.weight", "decoder.conv_out.weight")),
    ("a VAE alone", lone(_class_name="AutoencoderKL")),
    ("a text encoder alone", lone("text_model.embeddings.token_embedding.weight")),
    ("a text encoder alone", lone(architectures=["CLIPTextModel"])),
)


@pytest.mark.parametrize(("name", "headers"), EXAMPLES)
def test_an_unsupported_checkpoint_is_refused_by_its_name(name: str, headers: Headers) -> None:
    with pytest.raises(CheckpointError) as refusal:
        recognise(headers, "model")
    assert refusal.value.what.startswith(f"model: {name} (")
    assert refusal.value.hint


def test_every_refusal_has_an_example() -> None:
    assert {name for name, _ in EXAMPLES} == {kind.name for kind in UNSUPPORTED}


def test_names_of_families_and_refusals_are_unique() -> None:
    names = [family.name for family in FAMILIES] + [kind.name for kind in UNSUPPORTED]
    assert len(names) == len(set(names))


def test_sd1_is_recognised_with_its_evidence() -> None:
    family, why = recognise(sd1(), "model")
    assert family.name == "sd1"
    assert "unet.cross_attention_dim = text_encoder.hidden_size = 768" in why


def test_sd2_is_told_by_its_text_encoder() -> None:
    family, why = recognise(sd2(), "model")
    assert family.name == "sd2"
    assert "text_encoder.hidden_act = 'gelu'" in why


def test_sdxl_is_told_by_its_second_text_encoder_and_added_conditions() -> None:
    family, why = recognise(xl(), "model")
    assert family.name == "sdxl"
    assert "unet.addition_embed_type = 'text_time'" in why


def test_a_latent_consistency_model_is_of_its_base_family() -> None:
    assert recognise(sd1(unet__time_cond_proj_dim=256), "model")[0].name == "sd1"
    assert recognise(xl(unet__time_cond_proj_dim=256), "model")[0].name == "sdxl"


def test_configs_of_the_first_releases_which_leave_keys_out_are_recognised() -> None:
    headers = sd1()
    config = {key: value for key, value in headers.configs["text_encoder"].items() if key != "hidden_act"}
    headers = replace(headers, configs={**headers.configs, "text_encoder": config})
    assert recognise(headers, "model")[0].name == "sd1"


@pytest.mark.parametrize("part", sorted(SD1_PARTS))
def test_a_part_that_the_index_does_not_list_is_named(part: str) -> None:
    headers = sd1()
    headers = replace(headers, parts={name: kind for name, kind in headers.parts.items() if name != part})
    with pytest.raises(CheckpointError, match=f"component '{part}' is missing"):
        recognise(headers, "model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unet__cross_attention_dim": 640}, "unet.cross_attention_dim = 640, text_encoder.hidden_size = 768"),
        ({"unet__class_embed_type": "timestep"}, "unet.class_embed_type = 'timestep'"),
        ({"unet__in_channels": 3}, "unet.in_channels = 3"),
        ({"unet__encoder_hid_dim_type": "ip_image_proj"}, "unet.encoder_hid_dim_type"),
        ({"text_encoder__max_position_embeddings": 248}, "max_position_embeddings = 248"),
    ],
)
def test_an_architecture_that_is_no_family_is_refused_with_the_facts(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match="StableDiffusionPipeline of no supported family") as refusal:
        recognise(sd1(**settings), "model")
    assert message in refusal.value.what


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families_have_every_component_and_are_found_by_name(family: Any) -> None:
    assert get_family(family.name) is family
    assert tuple(family.components) == tuple(name for name in ROLES if name in family.components)
    assert {"text_encoder", "unet", "vae_decoder", "vae_encoder"} <= set(family.components)
    assert {part.folder for part in family.components.values()} <= set(family.signature.parts)
    assert {name: family.part(name).folder for name in family.additions} == {"controlnet": "controlnet"}


def test_an_unknown_family_is_an_error_with_the_list() -> None:
    with pytest.raises(CheckpointError, match="no family named 'sd9'") as refusal:
        get_family("sd9")
    assert "sd1" in refusal.value.hint
