"""The parts that families are made of: how each is stored, now and in the past."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .family import Part

# diffusers before 0.15 named VAE attention after its AttentionBlock; files of that age are still what sites serve.
_OLD_VAE_ATTENTION: Final = (
    (r"(\.attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
)
_VAE_KEYS: Final = {
    "block_out_channels": list,
    "down_block_types": list,
    "up_block_types": list,
    "in_channels": int,
    "out_channels": int,
    "latent_channels": int,
    "layers_per_block": int,
}
_VAE_DEFAULTS: Final = {
    "scaling_factor": 0.18215,  # configs older than diffusers 0.11 lack it; Rombach et al., first-stage rescaling
    "shift_factor": None,
    "norm_num_groups": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}


def _vae_half(weights: str) -> Part:
    return Part(
        folder="vae",
        classes=("AutoencoderKL",),
        required=_VAE_KEYS,
        defaults=_VAE_DEFAULTS,
        weights=weights,
        renames=_OLD_VAE_ATTENTION,
        squeezed=r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$",
    )


VAE_HALVES: Final = {
    "vae_decoder": _vae_half(r"^(decoder|post_quant_conv)\."),
    "vae_encoder": _vae_half(r"^(encoder|quant_conv)\."),
}

UNET: Final = Part(
    folder="unet",
    classes=("UNet2DConditionModel",),
    required={
        "block_out_channels": list,
        "down_block_types": list,
        "up_block_types": list,
        "cross_attention_dim": int,
        "in_channels": int,
        "out_channels": int,
    },
    defaults={"flip_sin_to_cos": True, "freq_shift": 0, "layers_per_block": 2, "norm_num_groups": 32},
)

DENOISER: Final = {"unet": UNET}

CONTROLNET: Final = Part(
    folder="controlnet",
    classes=("ControlNetModel",),
    required={
        "block_out_channels": list,
        "down_block_types": list,
        "cross_attention_dim": int,
    },
    # of ControlNetModel's constructor, as configs of before diffusers 0.17 leave some of it out
    defaults={
        "in_channels": 4,
        "conditioning_channels": 3,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
    },
)

# What a UNet of every family here leaves at its default.
PLAIN_UNET: Final[Mapping[str, tuple[Any, ...]]] = {
    "unet.in_channels": (4, 9),  # 9: inpainting, with a mask and the latents of what is kept
    "unet.class_embed_type": (None,),
    "unet.encoder_hid_dim_type": (None,),
    "unet.attention_type": (None, "default"),
}

CLIP_KEYS: Final = {
    "hidden_size": int,
    "intermediate_size": int,
    "num_attention_heads": int,
    "num_hidden_layers": int,
    "vocab_size": int,
}
_POSITION_IDS: Final = r"(^|\.)embeddings\.position_ids$"


def text_encoder(**defaults: Any) -> Part:
    """A CLIPTextModel; `defaults` are added to what its config leaves out."""
    return Part(
        folder="text_encoder",
        classes=("CLIPTextModel",),
        required=CLIP_KEYS,
        defaults={"max_position_embeddings": 77, "hidden_act": "quick_gelu", **defaults},
        ignored=_POSITION_IDS,
        renames=((r"^text_model\.", ""),),  # transformers 4 wrapped the encoder in an attribute of that name
    )


def projected_text_encoder(**defaults: Any) -> Part:
    """A CLIPTextModelWithProjection, whose encoder is wrapped in every version."""
    return Part(
        folder="text_encoder_2",
        classes=("CLIPTextModelWithProjection",),
        required={**CLIP_KEYS, "projection_dim": int},
        defaults={"max_position_embeddings": 77, "hidden_act": "quick_gelu", **defaults},
        ignored=_POSITION_IDS,
    )


def listed(components: Mapping[str, Part], *more: str) -> tuple[str, ...]:
    """What a pipeline of `components` lists in its model_index.json, beside a scheduler and a tokenizer."""
    return (*dict.fromkeys(part.folder for part in components.values()), "scheduler", "tokenizer", *more)
