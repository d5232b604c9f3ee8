"""Checkpoints that people hand in and that are refused by name, most specific first."""

from __future__ import annotations

from typing import Final

from .family import Signature, Unsupported

_NOT_YET: Final = "this family is not supported yet"
_TRANSFORMER: Final = "its denoiser is a transformer, and only UNets are supported"
_ADD_ON: Final = "it only changes a checkpoint and holds no model of its own"
_GIVE_BASE: Final = "give the checkpoint that it was made for"
_GIVE_BOTH: Final = "give the checkpoint that it was made for, and this with --adapter"
_FRAMES: Final = "it draws frames, and only single pictures are supported"
_GIVE_UNET: Final = "give a Stable Diffusion checkpoint whose denoiser is a UNet"
_LONE: Final = "one model of a pipeline cannot be converted alone"
_GIVE_WHOLE: Final = "give the whole diffusers folder, the one with model_index.json"


UNSUPPORTED: Final[tuple[Unsupported, ...]] = (
    # Add-ons
    Unsupported(
        "a LoRA or LyCORIS adapter",
        _ADD_ON,
        (
            Signature(tensors=(r"(^|[._])lora_?([AB]|up|down|unet|te\d?|linear_layer|magnitude_vector)([._]|$)",)),
            Signature(tensors=(r"\.lora\.(up|down)\.",)),
            Signature(tensors=(r"\.(hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_(blocks|diag))$",)),
            Signature(lone=True, given=(".peft_type",)),
            Signature(lone=True, tensors=(r"^base_model\.model\.",)),  # whatever kind PEFT will have next
        ),
        _GIVE_BOTH,
    ),
    Unsupported("an IP-Adapter", _ADD_ON, (Signature(lone=True, tensors=(r"^ip_adapter\.",)),), _GIVE_BASE),
    Unsupported(
        "a textual inversion (an embedding of new words)",
        _ADD_ON,
        (Signature(lone=True, tensors=(r"^(emb_params|string_to_param(\..*)?|clip_[lg]|<[^>]+>)$",)),),
        _GIVE_BOTH,
    ),
    Unsupported(
        "a ControlNet alone",
        _ADD_ON,
        (
            Signature(lone=True, classes="(Flux|SD3)?ControlNet(XS|Union)?.*Model"),
            Signature(
                lone=True, tensors=(r"(^|\.)(controlnet_cond_embedding|controlnet_down_blocks|input_hint_block)\.",)
            ),
        ),
        "give the checkpoint that it steers, and this with --controlnet",
    ),
    # Single files; those of the original code with a UNet are opened
    Unsupported(
        "a single-file SD3 checkpoint",
        _TRANSFORMER,
        (Signature(lone=True, tensors=(r"^(model\.diffusion_model\.)?joint_blocks\.",)),),
        _GIVE_UNET,
    ),
    Unsupported(
        "a single-file Flux checkpoint",
        _TRANSFORMER,
        (Signature(lone=True, tensors=(r"^(model\.diffusion_model\.)?double_blocks\.",)),),
        _GIVE_UNET,
    ),
    Unsupported(
        "a single-file video model",
        _FRAMES,
        (
            Signature(
                lone=True,
                tensors=(
                    r"\.(time_stack|time_mixer|motion_modules)(\.|$)"
                    r"|(^|\.)(patchify_proj|txt_in\.individual_token_refiner|head\.modulation)(\.|$)"
                    r"|\.attn\.qkv_x\.",
                ),
            ),
        ),
        _GIVE_UNET,
    ),
    Unsupported(
        "a single-file diffusion transformer",
        _TRANSFORMER,
        (
            Signature(
                lone=True,
                tensors=(
                    r"^(model\.diffusion_model|net)\.(?!input_|output_)([a-z]+_)*(blocks|layers|transformer_blocks)\.\d+\."
                    r"|^(x_embedder|pos_embed)\.proj\.",
                ),
            ),
        ),
        _GIVE_UNET,
    ),
    # Pipelines of other families
    Unsupported(
        "Stable Diffusion 3",
        _TRANSFORMER,
        (Signature(classes=r"StableDiffusion3.*|SD3Transformer2DModel"), Signature(parts=("text_encoder_3",))),
    ),
    Unsupported("Flux", _TRANSFORMER, (Signature(classes=r"Flux.*"),)),
    Unsupported("PixArt", _TRANSFORMER, (Signature(classes=r"PixArt.*"),)),
    Unsupported("DiT", _TRANSFORMER, (Signature(classes=r"DiT.*"),)),
    Unsupported(
        "a video model",
        _FRAMES,
        (
            Signature(
                classes=r"UNet3DConditionModel|UNetMotionModel|UNetSpatioTemporalConditionModel|MotionAdapter"
                r"|.*Transformer3DModel|.*Video.*(Pipeline|Model)|AnimateDiff.*|TextToVideo.*"
            ),
            # a config that hides its class: temporal layers exist in video UNets only
            Signature(tensors=(r"\.(temp_convs|temp_attentions|motion_modules|temporal_transformer_blocks)\.",)),
        ),
    ),
    Unsupported(
        "a diffusion transformer",
        _TRANSFORMER,
        (Signature(parts=("transformer",)), Signature(classes=r".*Transformer(2D)?Model|.*DiT.*Model")),
    ),
    Unsupported(
        "the Stable Diffusion XL refiner",
        "it refines what another checkpoint drew, which no bundle can do yet",
        (Signature(settings={"unet.addition_embed_type": ("text_time",), "unet.cross_attention_dim": (1280,)}),),
        "give the base checkpoint",
    ),
    Unsupported("Kandinsky", _NOT_YET, (Signature(parts=("movq",)), Signature(classes=r"Kandinsky.*"))),
    Unsupported("Stable Cascade or Würstchen", _NOT_YET, (Signature(classes=r"(StableCascade|Wuerstchen|Paella).*"),)),
    Unsupported("DeepFloyd IF", _NOT_YET, (Signature(classes=r"IF(Img2Img|Inpainting)?(SuperResolution)?Pipeline"),)),
    Unsupported(
        "a pipeline with several ControlNets, or one of another kind",
        "one ControlNet at a time is supported",
        (Signature(parts=("controlnet",), classes=r"MultiControlNet.*|ControlNet(Union|XS).*"),),
    ),
    Unsupported(
        "an InstructPix2Pix checkpoint",
        "its UNet also takes a picture to edit, which no bundle can feed yet",
        (Signature(settings={"unet.in_channels": (8,)}),),
    ),
    Unsupported(
        "a Stable Diffusion upscaler",
        "its UNet also takes the picture to enlarge, which no bundle can feed yet",
        (Signature(settings={"unet.in_channels": (7,)}), Signature(classes=r"StableDiffusion.*Upscale.*")),
    ),
    Unsupported("Stable Diffusion 2 depth-to-image", _NOT_YET, (Signature(parts=("depth_estimator",)),)),
    # One model where a pipeline belongs
    Unsupported(
        "a language model",
        "it writes text and draws nothing",
        (
            Signature(lone=True, classes=r".*For(CausalLM|ConditionalGeneration|SequenceClassification|MaskedLM)"),
            Signature(lone=True, tensors=(r"^(model\.|transformer\.|language_model\.)+(layers|h)\.\d+\.",)),
            Signature(lone=True, tensors=(r"^h\.\d+\.(attn|ln_1)\.",)),  # GPT-2 as its authors saved it
        ),
        "give a Stable Diffusion checkpoint",
    ),
    Unsupported(
        "a UNet alone",
        _LONE,
        (
            Signature(lone=True, classes=r"UNet2D(Condition)?Model"),
            Signature(lone=True, tensors=(r"^down_blocks\.0\.", r"^mid_block\.")),
        ),
        f"{_GIVE_WHOLE}; a UNet that was published alone (DMD2) goes into a copy of its base's folder, "
        "as unet/diffusion_pytorch_model.safetensors",
    ),
    Unsupported(
        "a VAE alone",
        _LONE,
        (
            Signature(lone=True, classes=r"Autoencoder.*|VQModel"),
            Signature(lone=True, tensors=(r"^decoder\.conv_in\.", r"^decoder\.conv_out\.")),
        ),
        _GIVE_WHOLE,
    ),
    Unsupported(
        "a text encoder alone",
        _LONE,
        (
            Signature(lone=True, classes=r"CLIP.*Model.*|T5.*Model"),
            Signature(lone=True, tensors=(r"(^|\.)embeddings\.token_embedding\.|^encoder\.block\.\d+\.layer\.",)),
        ),
        _GIVE_WHOLE,
    ),
)
