"""The small files that make an ORT bundle a folder which optimum's `ORTStableDiffusionPipeline` loads.

optimum wants `model_index.json`, the scheduler's configuration, a `config.json` beside each `model.onnx`, and, with
the transformers 4 that it needs, CLIP's old tokenizer files (github.com/huggingface/optimum-onnx,
optimum/onnxruntime/modeling_diffusion.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .artifacts import Checkpoint

# Where a model lay on its author's disk is nobody's business.
_PRIVATE: Final = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")


def optimum_assets(checkpoint: Checkpoint, tokenizer_json: Path) -> dict[str, bytes]:
    """Path in the bundle -> content, for a Stable Diffusion checkpoint.

    Args:
        tokenizer_json: the bundle's tokenizer; old tokenizer files that the checkpoint lacks are made of it.
    """
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", checkpoint.scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    assets = {"model_index.json": _json(index), "scheduler/scheduler_config.json": _json(checkpoint.scheduler)}
    for name, source in checkpoint.components.items():
        assets[f"{name}/config.json"] = _json(source.config)
    return assets | _old_tokenizer(checkpoint.tokenizer, tokenizer_json)


def _old_tokenizer(folder: Path, tokenizer_json: Path) -> dict[str, bytes]:
    model = json.loads(tokenizer_json.read_bytes())["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    made = {
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *pairs, ""]).encode(),
    }
    for name in made:
        if (folder / name).is_file():
            made[name] = (folder / name).read_bytes()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            made[name] = _json(json.loads((folder / name).read_bytes()))
    return {f"tokenizer/{name}": content for name, content in made.items()}


def _json(config: Mapping[str, Any]) -> bytes:
    public = {key: value for key, value in config.items() if key not in _PRIVATE}
    return (json.dumps(public, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
