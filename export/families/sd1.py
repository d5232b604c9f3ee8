"""Stable Diffusion 1.x: CLIP ViT-L text encoder, UNet with one cross-attention stream, KL autoencoder.

"High-Resolution Image Synthesis with Latent Diffusion Models" (Rombach et al. 2022). Pruned and distilled
relatives (BK-SDM, small-sd) are the same family with fewer blocks: the config says so, nothing here does.
"""

from __future__ import annotations

from typing import Final

from .family import Family, Part, Signature

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


SD1: Final = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    components={
        "text_encoder": Part(
            folder="text_encoder",
            classes=("CLIPTextModel",),
            required={
                "hidden_size": int,
                "intermediate_size": int,
                "num_attention_heads": int,
                "num_hidden_layers": int,
                "vocab_size": int,
            },
            defaults={"max_position_embeddings": 77, "hidden_act": "quick_gelu"},
            ignored=r"(^|\.)embeddings\.position_ids$",
            renames=((r"^text_model\.", ""),),  # transformers 4 wrapped the encoder in an attribute of that name
        ),
        "unet": Part(
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
        ),
        "vae_decoder": _vae_half(r"^(decoder|post_quant_conv)\."),
        "vae_encoder": _vae_half(r"^(encoder|quant_conv)\."),
    },
    signature=Signature(
        parts=("text_encoder", "unet", "vae", "scheduler", "tokenizer"),
        settings={
            "unet.in_channels": (4,),
            "unet.time_cond_proj_dim": (None,),
            "unet.class_embed_type": (None,),
            "unet.addition_embed_type": (None,),
            "unet.encoder_hid_dim_type": (None,),
            "unet.attention_type": (None, "default"),
            "text_encoder.hidden_act": (None, "quick_gelu"),
            "text_encoder.max_position_embeddings": (None, 77),
        },
        equal=(("unet.cross_attention_dim", "text_encoder.hidden_size"),),
    ),
)
