"""Tiny random Stable Diffusion 1.x checkpoints, written by diffusers and transformers themselves, and their damage.

Every function that damages writes in place: give it a copy (the fixture `tiny_copy`).
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from diffusette.checkpoints.checkpoint import DEMO_FOLDER
from diffusette.checkpoints.safetensors_file import read_header
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"


def tiny_pipeline(seed: int = 0) -> Any:
    """A StableDiffusionPipeline with random weights and the demo's tokenizer: 64x64 pictures, 8x8 latents."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    diffusers: Any = import_module("diffusers")  # its type annotations are partial and partly wrong
    torch.manual_seed(seed)
    pipeline = diffusers.StableDiffusionPipeline(
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=32,
                intermediate_size=64,
                num_attention_heads=2,
                num_hidden_layers=2,
                max_position_embeddings=77,
                hidden_act="quick_gelu",
                vocab_size=681,
                bos_token_id=679,
                eos_token_id=680,
                pad_token_id=680,
            )
        ),
        tokenizer=CLIPTokenizer.from_pretrained(DEMO_FOLDER / "tokenizer"),
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
        ),
        vae=diffusers.AutoencoderKL(
            sample_size=64,
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
        ),
        scheduler=diffusers.DDIMScheduler.from_pretrained(DEMO_FOLDER / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for module in (pipeline.text_encoder, pipeline.unet, pipeline.vae):
        module.eval()
    return pipeline


def write_tiny_sd1(folder: Path, seed: int = 0, **save: Any) -> Path:
    """Save `tiny_pipeline(seed)`; `save` goes to diffusers' save_pretrained (variant=, max_shard_size=, ...)."""
    tiny_pipeline(seed).save_pretrained(folder, **save)
    return folder


def edit_json(file: Path, changes: Mapping[str, Any], remove: tuple[str, ...] = ()) -> None:
    """Set and remove keys of a JSON object."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in remove}))


def edit_tensors(file: Path, edit: Callable[[Arrays], Arrays]) -> None:
    """Rewrite a safetensors file with what `edit` makes of its tensors."""
    from safetensors.numpy import load_file, save_file

    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def rename_tensors(file: Path, rename: Callable[[str], str]) -> None:
    """Rewrite a safetensors file under other tensor names."""
    edit_tensors(file, lambda tensors: {rename(name): values for name, values in tensors.items()})


def poison(file: Path, tensor: str, index: int, value: float) -> None:
    """Overwrite one float32 value of a tensor in place: the header stays as it is."""
    stored = read_header(file)[tensor]
    with file.open("r+b") as stream:
        stream.seek(stored.start + 4 * index)
        stream.write(np.float32(value).tobytes())


def truncate(file: Path, missing: int) -> None:
    """Cut `missing` bytes off the end."""
    os.truncate(file, file.stat().st_size - missing)


def raw_safetensors(file: Path, header: bytes | Mapping[str, Any], data: bytes = b"") -> Path:
    """Write a file of the format's outer shape with any header at all."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return file


def lone_safetensors(file: Path, names: tuple[str, ...], huge: bool = False) -> Path:
    """A well-formed file with one tensor a name; `huge` makes each 8 GB of hole, which nobody reads in a second."""
    width = 2**33 if huge else 4
    header = {
        name: {"dtype": "F32", "shape": [width // 4], "data_offsets": [i * width, (i + 1) * width]}
        for i, name in enumerate(names)
    }
    raw_safetensors(file, header)
    os.truncate(file, file.stat().st_size + width * len(names))
    return file


class Bomb:
    """Unpickling it creates the file `marker`: proof that code ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def malicious_pickle(file: Path, marker: Path) -> None:
    """A pickle, in the zip form of torch.save or bare, that makes the folder `marker` when it is loaded."""
    if file.suffix == ".ckpt":
        file.write_bytes(pickle.dumps({"state_dict": Bomb(marker)}))
        return
    import torch

    torch.save({"state_dict": Bomb(marker)}, file)
