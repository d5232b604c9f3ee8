"""A single file of the original code, laid out as the diffusers folder that it would be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ...stages.artifacts import Companions, StoredTensor
from ...stages.errors import CheckpointError
from ..adapters.text_width import refuse_other_width
from ..diffusers_folder import find_tokenizer_files, read_headers
from ..families import Headers, get_family, refuse_unsupported
from ..layout import Layout, PartWeights
from ..stored_file import read_stored
from .evidence import Evidence, gather
from .known_configs import recognise_text_encoder
from .names import (
    CLIP_PREFIXES,
    OPEN_CLIP_PREFIXES,
    UNET,
    VAE_PREFIXES,
    Tensors,
    clip_names,
    open_clip_names,
    unet_names,
    vae_names,
    vae_tensors,
)
from .schedulers import scheduler_config
from .shapes import clip_config, open_clip_config, unet_config, vae_config
from .tokenizer import find_tokenizer

_SCALING: Final = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}  # scale_factor of the families' own YAMLs
_PIXELS: Final = {"sd1": 512, "sd2": 512, "sdxl": 1024}
_PIXELS_SD2_V: Final = 768


def read_single_file(file: Path, given: Companions) -> Layout:
    """Take `file` apart: a safetensors file, or one that torch.save wrote.

    Reads its header (and, for a vocabulary of its own, one small tensor).

    Raises:
        CheckpointError: it is of another kind, incomplete, or something that it does not state is needed.
    """
    stored, metadata = read_stored(file)
    try:
        return read_tensors(file, stored, metadata, given)
    except (IndexError, ValueError, ZeroDivisionError) as error:  # a shape of other rank than its name promises
        raise CheckpointError(
            f"{file}: its tensors have the names of a checkpoint of the original code, but not the shapes ({error})",
            hint="the file is damaged or was made by a tool that is not known here: take the original",
        ) from error


def read_tensors(file: Path, stored: Tensors, metadata: Mapping[str, str], given: Companions) -> Layout:
    """As `read_single_file`, with the header's content."""
    where = str(file)
    denoiser = {name: tensor.shape for name, tensor in stored.items() if name.startswith(UNET)}
    refuse_unsupported(Headers(tensors={"": denoiser}), where)
    kind = _kind(stored, where)
    _require(stored, kind, given, where)
    refuse_other_width(given.adapters, _text_width(denoiser))
    known = recognise_text_encoder(stored) if given.config is None else None
    if given.config is not None and given.config.is_dir():
        folder: Path | None = given.config
        remarks = ["configurations from --config"]
    else:
        folder = known
        remarks = [f"configurations of {known.name}, whose text encoder this is"] if known else []
    evidence = gather(file, stored, metadata, given)
    says = ""  # how it is known what the UNet predicts, where no configuration states it
    if folder:
        configs = _stated(folder, kind, where)
    else:
        configs, says, found = _derived(stored, kind, evidence, where)
        remarks += [f"prediction {configs['scheduler']['prediction_type']} ({says})", *found]
    weights = {
        "unet": PartWeights((file,), unet_names(stored, configs["unet"], ema=given.ema), renamed=True),
        **{part: PartWeights((file,), tensors, renamed=True) for part, tensors in _texts(stored, kind, configs)},
    }
    if vae_tensors(stored):
        weights["vae"] = PartWeights((file,), vae_names(stored, configs["vae"]), renamed=True)
    tokenizers = _tokenizers(file, kind, folder, given, configs)
    remarks += [f"{part}: {says}" for part, (_, says) in tokenizers.items()]
    if any(name.startswith("model_ema.") for name in stored):
        remarks.append(
            "averaged weights (EMA) taken" if given.ema else "the file's averaged weights (EMA) are left out"
        )
    places = {file.name: file}
    for part, (place, _) in tokenizers.items():
        places |= {f"{part}/{f.name}": f for f in find_tokenizer_files(place)}
    stated = {part: config.get("architectures") or [config.get("_class_name")] for part, config in configs.items()}
    parts = {
        **{part: str(names[0]) for part, names in stated.items()},
        "vae": "AutoencoderKL",
        **dict.fromkeys(tokenizers, "CLIPTokenizer"),
    }
    shapes = {part: {t.name: t.shape for t in found.tensors} for part, found in weights.items()}
    # StableDiffusionXLPipeline's default, and what model_index.json of the base says
    settings = {"force_zeros_for_empty_prompt": True} if kind == "sdxl" else {}
    headers = Headers(get_family(kind).pipeline, parts, configs, shapes, settings=settings)
    first, second = tokenizers["tokenizer"][0], tokenizers["tokenizer_2"][0] if "tokenizer_2" in tokenizers else None
    return Layout(file, headers, weights, places, first, second, tuple(remarks), says)


def _tokenizers(
    file: Path, kind: str, folder: Path | None, given: Companions, configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[Path, str]]:
    """Part -> the folder of its tokenizer, and who says so."""
    parts = {"tokenizer": ("text_encoder", kind == "sd2")}
    if kind == "sdxl":
        parts["tokenizer_2"] = ("text_encoder_2", True)
    found = {}
    for part, (encoder, open_clip) in parts.items():
        if folder is not None and given.tokenizer is None and (folder / part).is_dir():
            found[part] = folder / part, "with the configurations"
        else:
            size = configs[encoder]["vocab_size"]
            found[part] = find_tokenizer(file, given.tokenizer, size, part=part, open_clip=open_clip)
    return found


def _kind(stored: Tensors, where: str) -> str:
    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in stored)

    if has(OPEN_CLIP_PREFIXES[1]) and has(CLIP_PREFIXES[1]):
        return "sdxl"
    if has("conditioner.embedders.0.model."):
        raise CheckpointError(
            f"{where}: the refiner of Stable Diffusion XL, which draws on nothing but another model's pictures",
            hint="give the base checkpoint",
        )
    if has(OPEN_CLIP_PREFIXES[0]):
        return "sd2"
    if has(CLIP_PREFIXES[0]):
        return "sd1"
    raise CheckpointError(
        f"{where}: a UNet of the original code without its text encoder",
        hint="give the full checkpoint, not the pruned UNet",
    )


def _text_width(denoiser: Mapping[str, tuple[int, ...]]) -> int | None:
    """Channels of the text that the UNet reads, without which no adapter can be told to be for it."""
    shapes = (shape for name, shape in denoiser.items() if name.endswith(".attn2.to_k.weight"))
    return next((shape[1] for shape in shapes if len(shape) == 2), None)


def _require(stored: Tensors, kind: str, given: Companions, where: str) -> None:
    if not vae_tensors(stored) and given.vae is None:
        raise CheckpointError(
            f"{where}: a single-file {get_family(kind).title} checkpoint without a VAE", hint="give one: --vae PATH"
        )


def _stated(folder: Path, kind: str, where: str) -> dict[str, dict[str, Any]]:
    """Configurations of a diffusers folder (its weights are not looked at)."""
    headers = read_headers(folder)
    configs = {part: dict(config) for part, config in headers.configs.items()}
    needed = ["unet", "vae", "text_encoder", "scheduler", *(["text_encoder_2"] if kind == "sdxl" else [])]
    missing = [part for part in needed if part not in configs]
    if missing:
        raise CheckpointError(f"{folder}: no configuration of {', '.join(missing)}, which {where} needs")
    configs["scheduler"].setdefault("_class_name", headers.parts["scheduler"])
    return configs


def _derived(
    stored: Tensors, kind: str, evidence: Evidence, where: str
) -> tuple[dict[str, dict[str, Any]], str, list[str]]:
    """Configurations as the shapes and the surroundings have it, who says what is predicted, and what is assumed."""
    unet, assumed = unet_config(_below(stored, UNET), where)
    unet |= evidence.unet
    scheduler, says = scheduler_config(kind, evidence, where, consistent="time_cond_proj_dim" in unet)
    configs = {"unet": unet, "scheduler": scheduler}
    if kind == "sd2":
        prefix = OPEN_CLIP_PREFIXES[0]
        configs["text_encoder"] = open_clip_config(_below(stored, prefix), where, penultimate=True)
    else:
        prefix = CLIP_PREFIXES[0] if kind == "sd1" else CLIP_PREFIXES[1]
        configs["text_encoder"] = clip_config(_below(stored, prefix), where)
    if kind == "sdxl":
        prefix = OPEN_CLIP_PREFIXES[1]
        configs["text_encoder_2"] = open_clip_config(_below(stored, prefix), where, penultimate=False)
    pixels = evidence.pixels or (
        _PIXELS_SD2_V if kind == "sd2" and scheduler["prediction_type"] == "v_prediction" else _PIXELS[kind]
    )
    remarks = []
    if evidence.distilled and "time_cond_proj_dim" not in unet:
        word, whence = evidence.distilled
        remarks.append(
            f"a {word} model by {whence}: sampled with {scheduler['_class_name']} in few steps without guidance "
            "(rename the file if it is none)"
        )
    scale = 8
    autoencoder = vae_tensors(stored)
    vae: dict[str, Any] = {}
    if autoencoder:
        prefix = next((p for p in VAE_PREFIXES if any(name.startswith(p) for name in autoencoder)), "")
        vae = vae_config(_below(autoencoder, prefix), where)
        scale = int(2 ** (len(vae["block_out_channels"]) - 1))
    vae["sample_size"] = pixels
    vae["scaling_factor"] = evidence.scaling_factor[0] if evidence.scaling_factor else _SCALING[kind]
    if evidence.scaling_factor:
        remarks.append(f"VAE scaling {vae['scaling_factor']} ({evidence.scaling_factor[1]})")
    else:
        assumed.append(f"VAE scaling {vae['scaling_factor']}")
    configs["vae"] = vae
    unet["sample_size"] = pixels // scale
    if evidence.unet:
        assumed = [words for words in assumed if "attention heads" not in words]
    remarks.append(f"as the original code of {get_family(kind).title} fixes it: {', '.join(assumed)}, {pixels} pixels")
    return configs, says, remarks


def _texts(
    stored: Tensors, kind: str, configs: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, tuple[StoredTensor, ...]]]:
    def open_clip(part: str, prefix: str) -> tuple[StoredTensor, ...]:
        config = configs[part]
        return open_clip_names(stored, prefix, config["num_hidden_layers"], config["hidden_size"])

    if kind == "sd2":
        return [("text_encoder", open_clip("text_encoder", OPEN_CLIP_PREFIXES[0]))]
    found = [("text_encoder", clip_names(stored))]
    if kind == "sdxl":
        found.append(("text_encoder_2", open_clip("text_encoder_2", OPEN_CLIP_PREFIXES[1])))
    return found


def _below(stored: Tensors, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): t.shape for name, t in stored.items() if name.startswith(prefix)}
