"""The small files that make a bundle a folder which optimum's `ORTStableDiffusion(XL)Pipeline` opens.

optimum-onnx 0.1.0 reads, beside each component's `model.onnx`: `model_index.json`, a `config.json` a component,
the scheduler's config, and a tokenizer. It runs with transformers 4, whose CLIPTokenizer needs `vocab.json` and
`merges.txt` and stumbles over some of what transformers 5 writes into `tokenizer_config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ...checkpoints.config import PIXELS_PER_LATENT
from ...checkpoints.families import reference_pipeline
from ...checkpoints.families.family import STATES
from ...checkpoints.families.variant import reads_zeros_for_empty
from ...stages.artifacts import Checkpoint
from ...stages.errors import CheckpointError

# Paths of the author's disk, and versions. A UNet of diffusers < 0.9 with sample_size < 64 is "corrected" to 64
# by diffusers' own pipeline (StableDiffusionPipeline.__init__), which would break small pictures.
_LEFT_OUT: Final = {"_name_or_path", "_diffusers_version", "transformers_version", STATES, PIXELS_PER_LATENT}
# OpenAI's CLIP; every SD 1.x tokenizer has them.
_SPECIAL_TOKENS: Final = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
}
_MAX_TOKENS: Final = 77
_MERGES_HEADER: Final = "#version: 0.2"


def write_layout(checkpoint: Checkpoint, into: Path, size: tuple[int, int] | None = None) -> tuple[str, ...]:
    """Write the files below `into`; return their paths, sorted. See `layout_files`."""
    files = layout_files(checkpoint, size)
    for path, content in files.items():
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        (into / path).write_bytes(content)
    return tuple(files)


def layout_files(checkpoint: Checkpoint, size: tuple[int, int] | None = None) -> dict[str, bytes]:
    """Path -> content of each file, sorted by path. Equal checkpoints give equal bytes.

    None with a ControlNet: none of optimum's pipelines feeds a UNet with what that adds.

    Stable Diffusion XL's text encoders are said to have one layer: optimum asks a graph for as many hidden states as
    there are layers, and these give the one that is used (`optimum_outputs`, docs/decisions/0003).

    Args:
        size: height and width in pixels that the graphs were exported for; None when it is the checkpoint's own.
    """
    if "controlnet" in checkpoint.components:
        return {}
    is_xl = "text_encoder_2" in checkpoint.components
    configs = {f"{name}/config.json": dict(source.config) for name, source in checkpoint.components.items()}
    if size is not None and "unet/config.json" in configs:
        height, width = (side // checkpoint.vae_scale for side in size)
        # SDXL's pipeline multiplies it, so it must be a number there; other shapes have to be named to it in the call
        configs["unet/config.json"]["sample_size"] = height if height == width else [height, width]
    if is_xl:
        for name in ("text_encoder", "text_encoder_2"):
            configs[f"{name}/config.json"]["num_hidden_layers"] = 1
    configs["scheduler/scheduler_config.json"] = dict(checkpoint.scheduler)
    configs["model_index.json"] = {
        "_class_name": reference_pipeline(checkpoint),
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        **(_xl_entries(checkpoint) if is_xl else {"requires_safety_checker": False, "safety_checker": [None, None]}),
        "scheduler": ["diffusers", checkpoint.scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    public = {
        path: {key: value for key, value in config.items() if key not in _LEFT_OUT} for path, config in configs.items()
    }
    files = {path: _json(config) for path, config in public.items()}
    for part, folder in (("tokenizer", checkpoint.tokenizer), ("tokenizer_2", checkpoint.tokenizer_2)):
        if folder is not None:
            found = _tokenizer(folder, checkpoint.words)
            files |= {f"{part}/{name}": content for name, content in found.items()}
    return dict(sorted(files.items()))


def _xl_entries(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "force_zeros_for_empty_prompt": reads_zeros_for_empty(checkpoint),
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }


def _tokenizer(folder: Path, words: tuple[str, ...]) -> dict[str, bytes]:
    config = {
        **_SPECIAL_TOKENS,
        **_special_tokens(folder),
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": _MAX_TOKENS,
    }
    vocabulary, merges = _vocabulary(folder)
    files = {"tokenizer_config.json": _json(config), "vocab.json": vocabulary, "merges.txt": merges}
    if words:  # of textual inversions, behind all others
        first = len(json.loads(vocabulary))
        files["added_tokens.json"] = _json({word: first + number for number, word in enumerate(words)})
    return files


def _special_tokens(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            for key, token in json.loads((folder / name).read_bytes()).items():
                text = token.get("content") if isinstance(token, dict) else token  # a dict is a serialised AddedToken
                if key in _SPECIAL_TOKENS and isinstance(text, str):
                    found[key] = text
    return found


def _vocabulary(folder: Path) -> tuple[bytes, bytes]:
    """vocab.json and merges.txt, made of tokenizer.json where transformers 5 left them out."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if vocabulary.is_file() and merges.is_file():
        return vocabulary.read_bytes(), merges.read_bytes()
    try:
        model = json.loads((folder / "tokenizer.json").read_bytes())["model"]
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        return _json(model["vocab"], sort=False), "\n".join([_MERGES_HEADER, *pairs, ""]).encode()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: neither vocab.json with merges.txt nor a byte-pair tokenizer.json: {error}"
        ) from None


def _json(value: Mapping[str, Any], *, sort: bool = True) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=sort, ensure_ascii=False) + "\n").encode()
