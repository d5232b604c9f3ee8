"""Stable Diffusion XL: two text encoders, a pooled embedding, and the picture's size as a condition.

"SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (Podell et al. 2023). The penultimate
states of both encoders, side by side, are the UNet's context. Segmind's SSD-1B and Vega are this with fewer blocks.
"""

from __future__ import annotations

from typing import Final

from .family import PENULTIMATE, STATES, Family, Signature
from .parts import CONTROLNET, DENOISER, PLAIN_UNET, VAE_HALVES, listed, projected_text_encoder, text_encoder

_COMPONENTS: Final = {
    "text_encoder": text_encoder(**{STATES: PENULTIMATE}),
    "text_encoder_2": projected_text_encoder(**{STATES: PENULTIMATE}),
    **DENOISER,
    **VAE_HALVES,
}

SDXL: Final = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    components=_COMPONENTS,
    guidance=5.0,
    lcm_guidance=8.0,  # latent-consistency/lcm-sdxl's card
    signature=Signature(
        parts=listed(_COMPONENTS, "tokenizer_2"),
        settings={
            **PLAIN_UNET,
            "unet.addition_embed_type": ("text_time",),
            "text_encoder.max_position_embeddings": (None, 77),
            "text_encoder_2.max_position_embeddings": (None, 77),
        },
        given=("unet.addition_time_embed_dim", "unet.projection_class_embeddings_input_dim"),
    ),
    pipeline="StableDiffusionXLPipeline",
    additions={"controlnet": CONTROLNET},
)
