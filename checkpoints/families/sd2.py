"""Stable Diffusion 2.x: OpenCLIP ViT-H text encoder, otherwise as 1.x.

https://github.com/Stability-AI/stablediffusion. The text encoder's penultimate states are used; diffusers ships it
without its last layer (23 of 24), so that its last states are those. GELU is exact, where OpenAI's CLIP has quick_gelu.
"""

from __future__ import annotations

from typing import Final

from .family import Family, Signature
from .parts import CONTROLNET, DENOISER, PLAIN_UNET, VAE_HALVES, listed, text_encoder

_COMPONENTS: Final = {"text_encoder": text_encoder(), **DENOISER, **VAE_HALVES}

SD2: Final = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    components=_COMPONENTS,
    guidance=7.5,
    prediction=None,
    signature=Signature(
        parts=listed(_COMPONENTS),
        settings={
            **PLAIN_UNET,
            "unet.addition_embed_type": (None,),
            "text_encoder.hidden_act": ("gelu",),
            "text_encoder.max_position_embeddings": (None, 77),
        },
        equal=(("unet.cross_attention_dim", "text_encoder.hidden_size"),),
    ),
    additions={"controlnet": CONTROLNET},
)
