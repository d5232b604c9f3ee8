"""Configurations of diffusers and transformers, read off the shapes in a file of the original code.

What shapes cannot tell (heads of attention, groups of normalisations, the factor of the latents) is what the original
code fixes; each such assumption is said in words, so that nobody has to guess what was guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from ...stages.errors import CheckpointError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

GROUPS: Final = 32  # of every GroupNorm: ldm/modules/diffusionmodules/{util,model}.py
SD1_HEADS: Final = 8  # v1-inference.yaml, num_heads
HEAD_CHANNELS: Final = 64  # of SD 2.x and SDXL (num_head_channels), and of every CLIP text encoder
_HINT: Final = "give the configurations of diffusers: --config FOLDER"


def unet_config(shapes: Shapes, where: str) -> tuple[dict[str, Any], list[str]]:
    """The UNet's config.json and what was assumed; `shapes` are its tensors without `model.diffusion_model.`.

    Raises:
        CheckpointError: the tensors are not those of a UNet of SD 1.x, 2.x or SDXL.
    """
    first = _need(shapes, "input_blocks.0.0.weight", where)
    channels, depths, per_level = _levels(shapes, where)
    context = next((s[1] for n, s in shapes.items() if n.endswith(".attn2.to_k.weight")), None)
    if context is None:
        raise CheckpointError(f"{where}: a UNet without cross-attention", hint="it is no text-to-image checkpoint")
    if len(set(per_level)) > 1:
        raise CheckpointError(f"{where}: {per_level} residual blocks in the levels of the UNet", hint=_HINT)
    linear = len(next(s for n, s in shapes.items() if n.endswith(".1.proj_in.weight"))) == 2
    middle = _depth(shapes, "middle_block.1")
    last = middle or depths[-1] or 1  # diffusers takes the middle's depth from the last level
    if depths[-1] not in (0, last):
        raise CheckpointError(f"{where}: {depths[-1]} transformer layers in the last level, {last} in the middle")
    layers = [depth or 1 for depth in depths[:-1]] + [last]
    if linear:
        _divide(channels, HEAD_CHANNELS, f"{where}: channels of the UNet", "attention heads of 64 channels")
        heads: Any = [width // HEAD_CHANNELS for width in channels]
        assumed = [f"attention heads of {HEAD_CHANNELS} channels"]
    else:
        _divide(channels, SD1_HEADS, f"{where}: channels of the UNet", f"{SD1_HEADS} attention heads")
        heads, assumed = SD1_HEADS, [f"{SD1_HEADS} attention heads"]
    _divide(channels, GROUPS, f"{where}: channels of the UNet", f"{GROUPS} groups")
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": first[1],
        "out_channels": _need(shapes, "out.2.weight", where)[0],
        "block_out_channels": channels,
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "layers_per_block": per_level[0],
        "transformer_layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "cross_attention_dim": context,
        "attention_head_dim": heads,
        "use_linear_projection": linear,
        "norm_num_groups": GROUPS,
    }
    if "label_emb.0.0.weight" in shapes:  # SDXL: the size's embedding and the pooled text, through one projection
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }
        assumed.append("size embeddings of 256 channels")
    if "time_embed.cond_proj.weight" in shapes:
        config["time_cond_proj_dim"] = shapes["time_embed.cond_proj.weight"][1]
    return config, assumed


def vae_config(shapes: Shapes, where: str) -> dict[str, Any]:
    """The VAE's config.json, without its scaling factor; `shapes` are its tensors without prefix."""
    widths: dict[int, int] = {}
    blocks: dict[int, int] = {}
    for name, shape in shapes.items():
        found = re.fullmatch(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight", name)
        if found:
            level, block = int(found[1]), int(found[2])
            widths[level], blocks[level] = shape[0], max(blocks.get(level, 0), block + 1)
    if not widths or sorted(widths) != list(range(len(widths))) or len(set(blocks.values())) != 1:
        raise CheckpointError(f"{where}: no autoencoder of latent diffusion", hint="give one with --vae")
    channels = [widths[level] for level in range(len(widths))]
    _divide(channels, GROUPS, f"{where}: channels of the VAE", f"{GROUPS} groups")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": _need(shapes, "encoder.conv_in.weight", where)[1],
        "out_channels": _need(shapes, "decoder.conv_out.weight", where)[0],
        "latent_channels": _need(shapes, "decoder.conv_in.weight", where)[1],
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": blocks[0],
        "norm_num_groups": GROUPS,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def clip_config(shapes: Shapes, where: str) -> dict[str, Any]:
    """config.json of CLIP's text encoder; `shapes` are its tensors without prefix (`text_model.` or nothing)."""
    found = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    layers = {int(m[1]) for name in found if (m := re.match(r"encoder\.layers\.(\d+)\.", name))}
    vocabulary, width = _need(found, "embeddings.token_embedding.weight", where)
    return _text_config(
        vocabulary,
        width,
        len(layers),
        _need(found, "encoder.layers.0.mlp.fc1.weight", where)[0],
        _need(found, "embeddings.position_embedding.weight", where)[0],
        where,
    ) | {"architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu"}


def open_clip_config(shapes: Shapes, where: str, *, penultimate: bool) -> dict[str, Any]:
    """config.json of OpenCLIP's text encoder; `shapes` are its tensors without prefix.

    Args:
        penultimate: SD 2.x reads the last hidden state but one and normalises it, so its model ends there.
    """
    layers = {int(m[1]) for name in shapes if (m := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
    vocabulary, width = _need(shapes, "token_embedding.weight", where)
    config = _text_config(
        vocabulary,
        width,
        len(layers) - penultimate,
        _need(shapes, "transformer.resblocks.0.mlp.c_fc.weight", where)[0],
        _need(shapes, "positional_embedding", where)[0],
        where,
    )
    if penultimate:
        return config | {"architectures": ["CLIPTextModel"], "hidden_act": "gelu"}
    return config | {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "projection_dim": _need(shapes, "text_projection", where)[1],
    }


def _text_config(vocabulary: int, width: int, layers: int, inner: int, context: int, where: str) -> dict[str, Any]:
    _divide([width], HEAD_CHANNELS, f"{where}: width of the text encoder", "attention heads of 64 channels")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_CHANNELS,
        "max_position_embeddings": context,
        # CLIP's vocabulary ends with its start and end tokens
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "projection_dim": width,
    }


def _levels(shapes: Shapes, where: str) -> tuple[list[int], list[int], list[int]]:
    """Channels, transformer depth (0: no attention) and number of residual blocks of each level."""
    channels, depths, blocks = [0], [0], [0]
    count = 1 + max((int(m[1]) for name in shapes if (m := re.match(r"input_blocks\.(\d+)\.", name))), default=0)
    for number in range(1, count):
        block = f"input_blocks.{number}"
        if f"{block}.0.op.weight" in shapes:
            channels.append(0)
            depths.append(0)
            blocks.append(0)
            continue
        channels[-1] = _need(shapes, f"{block}.0.out_layers.3.weight", where)[0]
        depths[-1] = max(depths[-1], _depth(shapes, f"{block}.1"))
        blocks[-1] += 1
    if not all(blocks):
        raise CheckpointError(f"{where}: a level of the UNet without residual blocks", hint=_HINT)
    return channels, depths, blocks


def _depth(shapes: Shapes, block: str) -> int:
    pattern = re.compile(re.escape(block) + r"\.transformer_blocks\.(\d+)\.")
    return len({m[1] for name in shapes if (m := pattern.match(name))})


def _divide(widths: list[int], by: int, what: str, why: str) -> None:
    odd = [width for width in widths if width % by]
    if odd:
        raise CheckpointError(f"{what} {odd} do not divide into the {why} of the original code", hint=_HINT)


def _need(shapes: Shapes, name: str, where: str) -> Shape:
    try:
        return shapes[name]
    except KeyError:
        raise CheckpointError(f"{where}: tensor {name!r} is missing", hint="download the file again") from None
