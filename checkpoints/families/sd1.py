"""Stable Diffusion 1.x: CLIP ViT-L text encoder, UNet with one cross-attention stream, KL autoencoder.

"High-Resolution Image Synthesis with Latent Diffusion Models" (Rombach et al. 2022). Pruned and distilled
relatives (BK-SDM, small-sd) are the same family with fewer blocks: the config says so, nothing here does.
"""

from __future__ import annotations

from typing import Final

from .family import Family, Signature
from .parts import CONTROLNET, DENOISER, PLAIN_UNET, VAE_HALVES, listed, text_encoder

_COMPONENTS: Final = {"text_encoder": text_encoder(), **DENOISER, **VAE_HALVES}

SD1: Final = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    components=_COMPONENTS,
    guidance=7.5,
    signature=Signature(
        parts=listed(_COMPONENTS),
        settings={
            **PLAIN_UNET,
            "unet.addition_embed_type": (None,),
            "text_encoder.hidden_act": (None, "quick_gelu"),
            "text_encoder.max_position_embeddings": (None, 77),
        },
        equal=(("unet.cross_attention_dim", "text_encoder.hidden_size"),),
    ),
    additions={"controlnet": CONTROLNET},
)
