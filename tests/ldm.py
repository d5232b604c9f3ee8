"""Single files in the key layout of the original code, written from diffusers' modules.

The names are those of Stability AI's and CompVis' repositories, spelled out here backwards: nothing of the package, and
nothing of diffusers' converters, is used, so that a file written here tests them both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_name(name: str, layers: int, attention_up: set[int]) -> str:
    """diffusers' name of a UNet tensor -> the original one. `attention_up`: up blocks with attention."""
    path, _, leaf = name.rpartition(".")
    if path in _UNET:
        return f"{_UNET[path]}.{leaf}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", path)
    if found:
        side, block, kind, index = found[1], int(found[2]), found[3], int(found[4])
        rest = found[5]
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (block + 1)}.0.op.{leaf}"
        if kind == "upsamplers":
            return f"output_blocks.{(layers + 1) * block + layers}.{2 if block in attention_up else 1}.conv.{leaf}"
        number = (layers + 1) * block + index + (side == "down")
        place = f"{'input' if side == 'down' else 'output'}_blocks.{number}"
        return f"{place}.0.{_RESNET[rest]}.{leaf}" if kind == "resnets" else f"{place}.1.{rest}.{leaf}"
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", path)
    assert middle, name
    if middle[1] == "attentions":
        return f"middle_block.1.{middle[3]}.{leaf}"
    return f"middle_block.{2 * int(middle[2])}.{_RESNET[middle[3]]}.{leaf}"


def vae_name(name: str, levels: int) -> str:
    """diffusers' name of a VAE tensor -> the original one."""
    name = re.sub(r"decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", name)
    name = re.sub(r"encoder\.down_blocks\.(\d+)", r"encoder.down.\1", name)
    name = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for new, old in _VAE_ATTENTION.items():
        name = name.replace(f"mid_block.attentions.0.{new}.", f"mid.attn_1.{old}.")
    name = name.replace(".resnets.", ".block.").replace("conv_shortcut", "nin_shortcut")
    return name.replace("conv_norm_out", "norm_out")


def ldm_unet(unet: Any, prefix: str = "model.diffusion_model.") -> Tensors:
    config = unet.config
    attention = {block for block, kind in enumerate(config.up_block_types) if kind.startswith("CrossAttn")}
    return {
        prefix + unet_name(name, config.layers_per_block, attention): values
        for name, values in unet.state_dict().items()
    }


def ldm_controlnet(controlnet: Any, prefix: str = "control_model.") -> Tensors:
    """A ControlNet under the names of lllyasviel's ControlLDM (cldm/cldm.py)."""
    blocks = len(controlnet.controlnet_cond_embedding.blocks)
    places = {"controlnet_cond_embedding.conv_in": "input_hint_block.0", "controlnet_mid_block": "middle_block_out.0"}
    places["controlnet_cond_embedding.conv_out"] = f"input_hint_block.{2 * (blocks + 1)}"
    places |= {f"controlnet_cond_embedding.blocks.{i}": f"input_hint_block.{2 * (i + 1)}" for i in range(blocks)}
    places |= {
        f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(len(controlnet.controlnet_down_blocks))
    }
    found = {}
    for name, values in controlnet.state_dict().items():
        path, _, leaf = name.rpartition(".")
        known = f"{places[path]}.{leaf}" if path in places else None
        found[prefix + (known or unet_name(name, controlnet.config.layers_per_block, set()))] = values
    return found


def ldm_vae(vae: Any, prefix: str = "first_stage_model.") -> Tensors:
    found = {}
    for name, values in vae.state_dict().items():
        old = vae_name(name, len(vae.config.block_out_channels))
        is_kernel = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", old)  # 1x1 convolutions there
        found[prefix + old] = values[:, :, None, None] if is_kernel else values
    return found


def ldm_clip(encoder: Any, prefix: str = "cond_stage_model.transformer.") -> Tensors:
    found = {f"{prefix}text_model.{_bare(name)}": values for name, values in encoder.state_dict().items()}
    positions = encoder.config.max_position_embeddings
    return {**found, f"{prefix}text_model.embeddings.position_ids": torch.arange(positions)[None]}


def ldm_open_clip(encoder: Any, prefix: str, *, dropped_layer: bool) -> Tensors:
    """OpenCLIP's names; `dropped_layer` adds the last layer, which SD 2.x holds and does not use."""
    state = {_bare(name): values for name, values in encoder.state_dict().items()}
    layers = encoder.config.num_hidden_layers
    found: Tensors = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
        "text_projection": state.get(
            "text_projection.weight", torch.randn(encoder.config.hidden_size, encoder.config.hidden_size)
        ).T,
    }
    for layer in range(layers + dropped_layer):
        source, block = f"encoder.layers.{min(layer, layers - 1)}", f"transformer.resblocks.{layer}"
        for leaf in ("weight", "bias"):
            for new, old in _OPEN_CLIP.items():
                found[f"{block}.{old}.{leaf}"] = state[f"{source}.{new}.{leaf}"]
            found[f"{block}.attn.in_proj_{leaf}"] = torch.cat(
                [state[f"{source}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            )
    return {prefix + name: values for name, values in found.items()}


def ldm_tensors(pipeline: Any) -> Tensors:
    """All tensors of a StableDiffusionPipeline (1.x or 2.x) or StableDiffusionXLPipeline, under the original names."""
    found = {**ldm_unet(pipeline.unet), **ldm_vae(pipeline.vae)}
    if getattr(pipeline, "text_encoder_2", None) is not None:
        found |= ldm_clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        return found | ldm_open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.", dropped_layer=False)
    if pipeline.text_encoder.config.hidden_act == "gelu":
        return found | ldm_open_clip(pipeline.text_encoder, "cond_stage_model.model.", dropped_layer=True)
    return found | ldm_clip(pipeline.text_encoder)


def with_ema(tensors: Tensors, average: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    """`tensors` with averaged copies of the UNet's, as the trainer of the original code stores them."""
    own = {n: v for n, v in tensors.items() if n.startswith("model.diffusion_model.")}
    return tensors | {f"model_ema.{n.removeprefix('model.').replace('.', '')}": average(v) for n, v in own.items()}


def write_ldm(
    file: Path, tensors: Mapping[str, torch.Tensor], dtype: Any = torch.float32, metadata: dict[str, str] | None = None
) -> Path:
    """Write a `.safetensors`, or (by suffix) a `.ckpt` as torch.save writes it."""
    cast = {n: (v.to(dtype) if v.is_floating_point() else v).contiguous().clone() for n, v in tensors.items()}
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(cast, file, metadata={"format": "pt", **(metadata or {})})
    else:
        torch.save({"state_dict": cast, "global_step": 470000}, file)
    return file


def _bare(name: str) -> str:
    return name.removeprefix("text_model.")


def original_pipeline(kind: str = "sd1", vocabulary: int = 681, **changes: Any) -> Any:
    """A tiny random pipeline of widths that the original code can say: 8 heads or 64 channels a head, 32 groups.

    Args:
        kind: sd1, sd2 or sdxl.
        vocabulary: rows of the token embeddings; 681 is the demo's tokenizer.
        changes: of the UNet's configuration.
    """
    from importlib import import_module

    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    diffusers: Any = import_module("diffusers")
    torch.manual_seed(0)

    def encoder(act: str, projected: bool = False, width: int = 64) -> Any:
        config = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=96,
            num_attention_heads=width // 64,
            num_hidden_layers=2,
            hidden_act=act,
            vocab_size=vocabulary,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            projection_dim=width,
        )
        return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)

    unet: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64) if kind == "sd1" else (64, 128),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 64 if kind != "sdxl" else 192,
        "attention_head_dim": 8 if kind == "sd1" else (1, 2),
        "use_linear_projection": kind != "sd1",
    }
    if kind == "sdxl":  # attention in the deeper levels only, and more of it in the deepest
        unet |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 6 * 256 + 128,
        }
    from types import SimpleNamespace

    pipeline = SimpleNamespace(
        unet=diffusers.UNet2DConditionModel(**(unet | changes)),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(32, 32, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
        ),
        text_encoder=encoder("gelu" if kind == "sd2" else "quick_gelu"),
        text_encoder_2=encoder("gelu", projected=True, width=128) if kind == "sdxl" else None,
    )
    return pipeline
