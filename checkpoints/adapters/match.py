"""Which parameter of the checkpoint each module of an adapter is for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any, Final

from ...stages.artifacts import ComponentSource, with_role
from ...stages.errors import CheckpointError
from .file import AdapterFile, StoredModule

SHOWN: Final = 8  # names in an error before "and N more"
# kohya's and LyCORIS' prefixes; SDXL's text encoders are numbered from 1
_FLAT: Final[Mapping[str, tuple[str, ...]]] = {
    "lora_unet_": ("unet",),
    "lycoris_": ("unet",),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
}
_OFT: Final = re.compile(r"^oft_(?=(unet|te\d?)_)")  # kohya's prefix of its rotations, which are named alike otherwise
# the rest of the original code's names, once diffusers has renamed the blocks
_SGM_ENDINGS: Final = (
    (r"^lora_unet_input_blocks_0_0$", "lora_unet_conv_in"),
    (r"^lora_unet_input_blocks_", "lora_unet_down_blocks_"),
    (r"^lora_unet_middle_block_", "lora_unet_mid_block_"),
    (r"^lora_unet_output_blocks_", "lora_unet_up_blocks_"),
    (r"_in_layers_2$", "_conv1"),
    (r"_emb_layers_1$", "_time_emb_proj"),
    (r"_out_layers_3$", "_conv2"),
    (r"_skip_connection$", "_conv_shortcut"),
    (r"_downsamplers_0_op$", "_downsamplers_0_conv"),
    (r"^lora_unet_out_2$", "lora_unet_conv_out"),
    (r"^lora_unet_time_embed_0$", "lora_unet_time_embedding_linear_1"),
    (r"^lora_unet_time_embed_2$", "lora_unet_time_embedding_linear_2"),
    (r"^lora_unet_label_emb_0_0$", "lora_unet_add_embedding_linear_1"),
    (r"^lora_unet_label_emb_0_2$", "lora_unet_add_embedding_linear_2"),
)

Matched = tuple[str, str, StoredModule]  # component, parameter without ".weight", what changes it


def match(
    adapter: AdapterFile, components: Mapping[str, ComponentSource], names: Mapping[str, Collection[str]]
) -> list[Matched]:
    """Pair every module of `adapter` with a weight.

    Args:
        names: by component, those of its weights.
    Raises:
        CheckpointError: a module has no weight in this checkpoint; lists all of them.
    """
    # today's name without transformers' wrapper -> today's name
    dotted = {
        component: {
            name.removesuffix(".weight").removeprefix("text_model."): name.removesuffix(".weight")
            for name in own
            if name.endswith(".weight")
        }
        for component, own in names.items()
    }
    flat = {name: {short.replace(".", "_"): module for short, module in own.items()} for name, own in dotted.items()}
    config = next((components[name].config for name in with_role("denoiser", components)), {})
    found: list[Matched] = []
    lost = []
    for stored, today in zip(adapter.modules, _from_sgm(adapter, config), strict=True):
        places = _flattened(today, flat) if today.startswith(tuple(_FLAT)) else _spelled(today, dotted)
        if not places:
            lost.append(stored.name)
        elif len(places) > 1:
            fitting = ", ".join(component for component, _ in places)
            raise CheckpointError(
                f"--adapter {adapter.weights}: {stored.name!r} fits {fitting}",
                hint="save it with a prefix that says which (unet., text_encoder., text_encoder_2.)",
            )
        else:
            found.append((*places[0], stored))
    if lost:
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        amount = f"only {len(found)} of its {len(adapter.modules)} modules match" if found else "nothing of it matches"
        raise CheckpointError(
            f"--adapter {adapter.weights}: {amount} this checkpoint; without a match: {', '.join(lost[:SHOWN])}{more}",
            hint="it was made for another family, or for parts that this checkpoint lacks",
        )
    return found


def _flattened(name: str, flat: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    prefix = next(prefix for prefix in _FLAT if name.startswith(prefix))
    rest = name.removeprefix(prefix).removeprefix("text_model_")
    return [(c, flat[c][rest]) for c in _FLAT[prefix] if c in flat and rest in flat[c]]


def _spelled(name: str, dotted: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    name = name.removeprefix("base_model.model.")
    first, _, rest = name.partition(".")
    wanted = {first: rest} if first in dotted else dict.fromkeys(dotted, name)
    found = []
    for component, module in wanted.items():
        module = re.sub(r"^text_model\.", "", module)
        # old diffusers spelled the attention of text encoders as its own
        module = re.sub(r"\.self_attn\.to_([qkv])$", r".self_attn.\1_proj", module)
        module = re.sub(r"\.self_attn\.to_out(\.0)?$", ".self_attn.out_proj", module)
        if module in dotted[component]:
            found.append((component, dotted[component][module]))
    return found


def _from_sgm(adapter: AdapterFile, config: Mapping[str, Any]) -> list[str]:
    """Names of the adapter's modules, those of the original UNet (kohya's for SDXL) in diffusers' spelling."""
    names = [_OFT.sub("lora_", module.name) for module in adapter.modules]
    sgm = [name for name in names if re.match(r"lora_unet_(input_blocks_(?!0_)|middle_block_|output_blocks_)", name)]
    if not sgm:
        return [_ending(name) for name in names]
    from diffusers.loaders import lora_conversion_utils as diffusers

    convert: Any = diffusers._maybe_map_sgm_blocks_to_diffusers
    layers = SimpleNamespace(layers_per_block=config.get("layers_per_block", 2))
    renamed = {}
    for name in sgm:  # one by one: given several, it returns them in another order
        try:
            renamed[name] = next(iter(convert({name: name}, layers)))
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"--adapter {adapter.weights}: {name!r}: {error}") from error
    return [_ending(renamed.get(name, name)) for name in names]


def _ending(name: str) -> str:
    if name.startswith("lora_unet_"):
        for pattern, today in _SGM_ENDINGS:
            name = re.sub(pattern, today, name)
    return name
