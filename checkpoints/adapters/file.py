"""An adapter's file or folder, taken apart from its header: which module it changes, by which factors.

Key styles: PEFT (`base_model.model.M.lora_A.weight`), diffusers (`unet.M.lora_A.weight`, `unet.M.lora.down.weight`,
`unet.M.processor.to_q_lora.down.weight`), kohya's and LyCORIS' (`lora_unet_M.lora_down.weight`, M with underscores).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ...stages.artifacts import StoredTensor
from ...stages.errors import CheckpointError
from ..diffusers_folder import read_json
from ..stored_file import read_stored

PEFT_CONFIG: Final = "adapter_config.json"
_FILES: Final = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # of PEFT and of diffusers
_METADATA: Final = "lora_adapter_metadata"  # diffusers' key in the header, loaders/lora_base.py

# stored ending -> factor. A PEFT adapter may carry its name between (`lora_A.default.weight`).
_FACTORS: Final[tuple[tuple[str, str], ...]] = (
    (r"\.lora_A(\.\w+)?\.weight|[._]lora\.down\.weight|\.lora_down\.weight|\.lora_linear_layer\.down\.weight", "down"),
    (r"\.lora_B(\.\w+)?\.weight|[._]lora\.up\.weight|\.lora_up\.weight|\.lora_linear_layer\.up\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.(dora_scale|lora_magnitude_vector(\.\w+)*)", "magnitude"),
    (r"\.alpha", "alpha"),
    (r"\.hada_(w1_a|w1_b|w2_a|w2_b|t1|t2)(\.\w+)?", "hada_"),
    (r"\.lokr_(w1|w1_a|w1_b|w2|w2_a|w2_b|t2)(\.\w+)?", "lokr_"),
    (r"\.oft_R(\.\w+)?(\.weight)?", "oft_R"),
    (r"\.boft_R(\.\w+)?", "boft_R"),
    (r"\.boft_s(\.\w+)?", "boft_s"),
    (r"\.oft_blocks", "oft_blocks"),
    (r"\.rescale", "rescale"),
    (r"\.(diff|w_norm)", "diff"),
    (r"\.(diff_b|b_norm)", "diff_b"),
)
_OUTDATED: Final = re.compile(r"\.oft_r(\.|$)|\.oft_diag$")


@dataclass(frozen=True, slots=True)
class StoredModule:
    """What an adapter holds for one module, which is named as the file names it."""

    name: str
    factors: Mapping[str, StoredTensor]  # "down", "up", "alpha", "hada_w1_a", ...


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter as it lies on the disk."""

    label: str  # file name, below its folder if that was given; no path of this machine
    weights: Path
    config: Path | None  # PEFT's adapter_config.json
    settings: Mapping[str, Any]  # what it says
    component_settings: Mapping[str, Mapping[str, Any]]  # diffusers' metadata, by component
    metadata: Mapping[str, str]
    modules: tuple[StoredModule, ...]
    embeddings: Mapping[str, StoredTensor] = field(default_factory=dict)  # of new words (textual inversion)


def read_adapter(place: Path) -> AdapterFile:
    """Read the header of the adapter at `place`: a safetensors file, or a folder of PEFT or diffusers with one.

    Raises:
        CheckpointError: there is none, it is damaged, or it is no adapter.
    """
    if not place.exists():
        raise CheckpointError(
            f"--adapter {place}: no such file or folder", hint="check the path; the form is PATH[:SCALE]"
        )
    weights = _weights_of(place) if place.is_dir() else place
    config = weights.parent / PEFT_CONFIG
    settings = read_json(config) if config.is_file() else {}
    stored, metadata = read_stored(weights)
    modules: dict[str, dict[str, StoredTensor]] = {}
    strangers = []
    for name, tensor in stored.items():
        found = _split(name)
        if found is None:
            strangers.append(name)
            continue
        module, factor = found
        if factor in modules.setdefault(module, {}):
            raise CheckpointError(
                f"{weights}: two tensors are the {factor!r} of {module}", hint="save it with one adapter"
            )
        modules[module][factor] = tensor
    outdated = next((name for name in strangers if _OUTDATED.search(name)), None)
    if outdated:
        raise CheckpointError(
            f"{weights}: {outdated!r} is OFT as PEFT computed it before 0.16, which differs from today's",
            hint="train or save it again with a current PEFT",
        )
    embeddings = embeddings_of(stored) if not modules else {}
    if strangers and not embeddings:
        shown = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        raise CheckpointError(
            f"--adapter {weights}: {len(strangers)} of {len(stored)} tensors "
            f"belong to no known kind of adapter: {shown}",
            hint="LoRA, DoRA, LoHa, LoKr, OFT, BOFT and embeddings of words are merged",
        )
    return AdapterFile(
        label=f"{place.name}/{weights.name}" if place.is_dir() else weights.name,
        weights=weights,
        config=config if settings else None,
        settings=settings,
        component_settings=_by_component(metadata, weights),
        metadata=metadata,
        modules=tuple(StoredModule(name, factors) for name, factors in modules.items()),
        embeddings=embeddings,
    )


def embeddings_of(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The embeddings of a textual inversion by what they are for; empty if this is none.

    A1111's `.pt` keeps them in `string_to_param`, beside the token that each takes the place of.
    """
    inner = "string_to_param."
    if any(name.startswith(inner) for name in stored):
        stored = {name.removeprefix(inner): tensor for name, tensor in stored.items() if name.startswith(inner)}
    is_one = all(re.fullmatch(r"emb_params|clip_[lg]|<[^>]+>", name) or len(stored) == 1 for name in stored)
    flat = all(len(tensor.shape) in (1, 2) for tensor in stored.values())
    return dict(stored) if is_one and flat else {}


def _weights_of(folder: Path) -> Path:
    named = [folder / name for name in _FILES if (folder / name).is_file()]
    found = named or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        what = "no safetensors file" if not found else f"{len(found)} safetensors files"
        raise CheckpointError(f"--adapter {folder}: {what} in it", hint="name the file itself")
    return found[0]


def _split(name: str) -> tuple[str, str] | None:
    """(module as stored, factor) of a tensor's name."""
    for pattern, factor in _FACTORS:
        found = re.search(rf"(?:{pattern})$", name)
        if found:
            module = name[: found.start()]
            attached = re.match(r"_lora\.(down|up)", found[0])
            if attached:  # diffusers before 0.22: attn1.processor.to_q_lora.down, of attn1.to_q
                module = module.replace(".processor.", ".")
                module = f"{module}.0" if module.endswith(".to_out") else module
            return module, factor + (found[1] if factor.endswith("_") and found[1] else "")
    return None


def _by_component(metadata: Mapping[str, str], file: Path) -> dict[str, dict[str, Any]]:
    if _METADATA not in metadata:
        return {}
    try:
        flat = json.loads(metadata[_METADATA])
        found: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            component, _, name = key.partition(".")
            found.setdefault(component, {})[name] = value
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: its {_METADATA} is no JSON object: {error}") from None
    return found
