"""Tiny random checkpoints of every kind that people have: the real architectures, a few channels wide.

`write_kind(name, folder)` saves a diffusers folder. Parts that two kinds share are equal to the byte, so that what
is built of one serves the other. Pictures have 64 x 64 pixels, latents 8 x 8.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from diffusette.checkpoints.checkpoint import DEMO_FOLDER

VOCABULARY: Final = {"vocab_size": 681, "bos_token_id": 679, "pad_token_id": 680}  # the demo's tokenizer
_BETAS: Final = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
_TURBO: Final = {**_BETAS, "timestep_spacing": "trailing", "prediction_type": "epsilon", "steps_offset": 1}


@dataclass(frozen=True)
class Kind:
    """What a checkpoint is made of; the functions and names that appear here are those of this file."""

    title: str  # for docs/kinds.md
    family: str
    pipeline: str
    unet: Mapping[str, Any] = field(default_factory=dict)  # what differs from the family's UNet
    scheduler: str = "DDIMScheduler"
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the scheduler


# Names and values are those that the published checkpoints of each kind have.
KINDS: Final[dict[str, Kind]] = {
    "sd1": Kind(
        "Stable Diffusion 1.x",
        "sd1",
        "StableDiffusionPipeline",
        {},
        "DDIMScheduler",
        {**_BETAS, "clip_sample": False, "steps_offset": 1},
    ),
    "sd2": Kind(
        "Stable Diffusion 2.x that predicts v (2.1 at 768 pixels)",
        "sd2",
        "StableDiffusionPipeline",
        {"use_linear_projection": True, "attention_head_dim": (2, 4)},
        "DDIMScheduler",
        {
            **_BETAS,
            "prediction_type": "v_prediction",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
    ),
    "sd2-base": Kind(
        "Stable Diffusion 2.x that predicts noise (2.1 base)",
        "sd2",
        "StableDiffusionPipeline",
        {"use_linear_projection": True, "attention_head_dim": (2, 4)},
        "PNDMScheduler",
        {**_BETAS, "prediction_type": "epsilon", "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
    ),
    "sdxl": Kind(
        "Stable Diffusion XL",
        "sdxl",
        "StableDiffusionXLPipeline",
        {},
        "EulerDiscreteScheduler",
        {**_BETAS, "steps_offset": 1, "timestep_spacing": "leading"},
    ),
    "lcm": Kind(
        "Latent consistency model of SD 1.x, guidance as an input (LCM Dreamshaper)",
        "sd1",
        "LatentConsistencyModelPipeline",
        {"time_cond_proj_dim": 32},
        "LCMScheduler",
        {**_BETAS, "clip_sample": False, "steps_offset": 1, "original_inference_steps": 50},
    ),
    "sdxl-lcm": Kind(
        "Latent consistency model of SDXL (lcm-sdxl's UNet)",
        "sdxl",
        "StableDiffusionXLPipeline",
        {"time_cond_proj_dim": 32},
        "LCMScheduler",
        {**_BETAS, "clip_sample": False, "steps_offset": 1, "original_inference_steps": 50},
    ),
    "sd-turbo": Kind(
        "SD-Turbo",
        "sd2",
        "StableDiffusionPipeline",
        {"use_linear_projection": True, "attention_head_dim": (2, 4)},
        "EulerDiscreteScheduler",
        _TURBO,
    ),
    "sdxl-turbo": Kind(
        "SDXL-Turbo, SDXL-Lightning", "sdxl", "StableDiffusionXLPipeline", {}, "EulerAncestralDiscreteScheduler", _TURBO
    ),
    "sdxl-dmd2": Kind(
        "Few-step generator with LCM's scheduler (DMD2, Hyper-SD, a merged LCM-LoRA)",
        "sdxl",
        "StableDiffusionXLPipeline",
        {},
        "LCMScheduler",
        {**_BETAS, "clip_sample": False, "steps_offset": 1, "original_inference_steps": 50},
    ),
    # BK-SDM: fewer blocks; its smallest has no middle block either
    "bk-sdm-tiny": Kind(
        "Pruned SD 1.x without a middle block (BK-SDM, small-sd)",
        "sd1",
        "StableDiffusionPipeline",
        {
            "mid_block_type": None,
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
        "PNDMScheduler",
        {**_BETAS, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
    ),
    # Segmind's SSD-1B and Vega: SDXL with fewer transformer layers, counted block by block
    "segmind": Kind(
        "Pruned SDXL (SSD-1B, Segmind Vega)",
        "sdxl",
        "StableDiffusionXLPipeline",
        {
            "transformer_layers_per_block": [1, [2]],
            "reverse_transformer_layers_per_block": [[1, 2], 1],
            "mid_block_type": None,
        },
        "EulerDiscreteScheduler",
        {**_BETAS, "steps_offset": 1, "timestep_spacing": "leading"},
    ),
    "sd1-inpainting": Kind(
        "SD 1.x for inpainting, nine channels",
        "sd1",
        "StableDiffusionInpaintPipeline",
        {"in_channels": 9},
        "PNDMScheduler",
        {**_BETAS, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
    ),
    "sd2-inpainting": Kind(
        "SD 2.x for inpainting, nine channels",
        "sd2",
        "StableDiffusionInpaintPipeline",
        {"in_channels": 9, "use_linear_projection": True, "attention_head_dim": (2, 4)},
        "DDIMScheduler",
        {**_BETAS, "prediction_type": "epsilon", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    ),
    "sdxl-inpainting": Kind(
        "SDXL for inpainting, nine channels",
        "sdxl",
        "StableDiffusionXLInpaintPipeline",
        {"in_channels": 9},
        "EulerDiscreteScheduler",
        {**_BETAS, "steps_offset": 1, "timestep_spacing": "leading"},
    ),
}


# Kinds above with a ControlNet of their own, given with --controlnet: the kind, and the title
CONTROLLED: Final[dict[str, tuple[str, str]]] = {
    "sd1-controlnet": ("sd1", "SD 1.x with a ControlNet (`--controlnet`)"),
    "sd2-controlnet": ("sd2", "SD 2.x with a ControlNet"),
    "sdxl-controlnet": ("sdxl", "SDXL with a ControlNet"),
}


def _diffusers() -> Any:
    return import_module("diffusers")  # its type annotations are partial and partly wrong


def _text_encoder(seed: int = 1, *, projected: bool = False, **config: Any) -> Any:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(
        CLIPTextConfig(
            **VOCABULARY,
            **{
                "eos_token_id": 680,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "max_position_embeddings": 77,
                "hidden_act": "quick_gelu",
                **config,
            },
        )
    ).eval()


def _unet(family: str, changes: Mapping[str, Any]) -> Any:
    import torch

    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    if family == "sdxl":
        config |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,  # pooled text, and six numbers
            "cross_attention_dim": 32 + 24,  # both text encoders side by side
        }
    torch.manual_seed(2)
    return _diffusers().UNet2DConditionModel(**{**config, **changes}).eval()


def _vae() -> Any:
    import torch

    torch.manual_seed(3)
    return (
        _diffusers()
        .AutoencoderKL(
            sample_size=64,
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
        )
        .eval()
    )


def _tokenizer(pad: str | None = None) -> Any:
    from transformers import CLIPTokenizer

    more = {"pad_token": pad} if pad else {}
    return CLIPTokenizer.from_pretrained(DEMO_FOLDER / "tokenizer", **more)


def _sd1_parts() -> dict[str, Any]:
    return {"text_encoder": _text_encoder(), "tokenizer": _tokenizer()}


def _sd2_parts() -> dict[str, Any]:
    """OpenCLIP's text encoder as diffusers ships it: without its last layer, exact GELU, padded with "!"."""
    encoder = _text_encoder(4, hidden_act="gelu", num_hidden_layers=3, projection_dim=24)
    return {"text_encoder": encoder, "tokenizer": _tokenizer("!")}


def _sdxl_parts() -> dict[str, Any]:
    # eos_token_id is 2 in the published configs: the end of the text is then its largest id
    second = {"hidden_size": 24, "intermediate_size": 48, "hidden_act": "gelu", "projection_dim": 24, "eos_token_id": 2}
    return {
        "text_encoder": _text_encoder(1, eos_token_id=2),
        "tokenizer": _tokenizer(),
        "text_encoder_2": _text_encoder(5, projected=True, num_hidden_layers=3, **second),
        "tokenizer_2": _tokenizer("!"),
    }


_PARTS: Final[dict[str, Callable[[], dict[str, Any]]]] = {"sd1": _sd1_parts, "sd2": _sd2_parts, "sdxl": _sdxl_parts}


def kind_pipeline(name: str, pipeline: str = "", **more: Any) -> Any:
    """The kind's diffusers pipeline with random weights; `pipeline` is another class over the same parts and `more`."""
    diffusers, kind = _diffusers(), KINDS[name]
    parts = _PARTS[kind.family]()
    if kind.family != "sdxl":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    made = getattr(diffusers, pipeline or kind.pipeline)(
        **parts,
        unet=_unet(kind.family, kind.unet),
        vae=_vae(),
        scheduler=getattr(diffusers, kind.scheduler).from_config(dict(kind.settings)),
        **more,
    )
    made.set_progress_bar_config(disable=True)
    return made


def write_kind(name: str, folder: Path) -> Path:
    """Save the kind's pipeline as a diffusers folder."""
    kind_pipeline(name).save_pretrained(folder)
    config = folder / "scheduler" / "scheduler_config.json"
    # saved with every default of today's class; published ones state what was known when they were made
    stated = json.loads(config.read_text())
    kept = {key: value for key, value in stated.items() if key in KINDS[name].settings or key.startswith("_")}
    config.write_text(json.dumps(kept))
    return folder


def tiny_controlnet(name: str) -> Any:
    """A ControlNet for the UNet of that kind. What training begins at zero is random: what it adds must be seen."""
    import torch

    unet = _unet(KINDS[name].family, {**KINDS[name].unet, "in_channels": 4})
    torch.manual_seed(7)
    made = _diffusers().ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(4, 4, 8, 8), load_weights_from_unet=False
    )
    hint = made.controlnet_cond_embedding
    for part in (hint.conv_in, *hint.blocks, hint.conv_out):
        # halved by every SiLU, a picture would not come through eight layers
        torch.nn.init.normal_(part.weight, std=2 / part.weight[0].numel() ** 0.5)
    for part in (*made.controlnet_down_blocks, made.controlnet_mid_block):
        torch.nn.init.normal_(part.weight, std=0.2)
    return made.eval()


def tiny_decoder(levels: int = 4) -> Any:
    """TAESD's architecture with random weights; it has four levels."""
    import torch

    torch.manual_seed(6)
    widths = {"encoder_block_out_channels": (8,) * levels, "decoder_block_out_channels": (8,) * levels}
    blocks = {"num_decoder_blocks": (1,) * levels, "num_encoder_blocks": (1,) * levels}
    return _diffusers().AutoencoderTiny(**widths, **blocks).eval()
