"""Write a checkpoint with the shapes of Stable Diffusion 1.5 and random weights, for measuring time and memory.

    python benchmarks/make_sd15.py FOLDER [--fp16] [--seed N]

A diffusers folder of 4.3 GB (2.1 GB with --fp16), written tensor by tensor: modules are built on the meta device
and each weight is drawn from PyTorch's default distribution for its layer, so activations keep a sane scale. The
tokenizer is the demo checkpoint's, with CLIP's ids for its two special tokens: it makes valid prompts, not SD's.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from diffusette.export.checkpoint import DEMO_FOLDER
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn

VOCABULARY: Final = 49408
SPECIAL_IDS: Final = {"<|startoftext|>": VOCABULARY - 2, "<|endoftext|>": VOCABULARY - 1}

# The configs of SD1.5 as its authors published them; what they leave out is the default of the class.
UNET: Final[dict[str, Any]] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
VAE: Final[dict[str, Any]] = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT_ENCODER: Final[dict[str, Any]] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "vocab_size": VOCABULARY,
    "bos_token_id": SPECIAL_IDS["<|startoftext|>"],
    "eos_token_id": SPECIAL_IDS["<|endoftext|>"],
    "pad_token_id": SPECIAL_IDS["<|endoftext|>"],
}

Draw = Callable[[np.random.Generator], NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fp16", action="store_true", help="store weights as float16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_sd15(options.folder, dtype="F16" if options.fp16 else "F32", seed=options.seed)


def make_sd15(folder: Path, *, dtype: str, seed: int) -> None:
    """Write the checkpoint. `folder` must not exist; `dtype` is safetensors' word, F32 or F16."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder.mkdir(parents=True)
    with torch.device("meta"):
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))
        unet = UNet2DConditionModel.from_config(UNET)  # type: ignore[no-untyped-call]
        vae = AutoencoderKL.from_config(VAE)  # type: ignore[no-untyped-call]
    for number, (name, module, stem) in enumerate(
        (
            ("text_encoder", text_encoder, "model"),
            ("unet", unet, "diffusion_pytorch_model"),
            ("vae", vae, "diffusion_pytorch_model"),
        )
    ):
        module.config.save_pretrained(folder / name) if name == "text_encoder" else module.save_config(folder / name)
        count = write_weights(
            folder / name / f"{stem}.safetensors", module, dtype, np.random.default_rng([seed, number])
        )
        print(f"{name}: {count / 1e6:.1f}M parameters")
    for copied in ("scheduler", "model_index.json"):
        source = DEMO_FOLDER / copied
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / copied)
    write_tokenizer(folder / "tokenizer")


def write_weights(file: Path, module: nn.Module, dtype: str, random: np.random.Generator) -> int:
    """Draw and write every parameter of the meta `module`, one in memory at a time; returns how many values."""
    stored = np.dtype({"F32": "<f4", "F16": "<f2"}[dtype])
    draws = dict(initialisers(module))
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * stored.itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # the format's own padding, so that tensors are aligned
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for name in shapes:
            stream.write(draws[name](random).astype(stored).tobytes())
    return end // stored.itemsize


def initialisers(module: nn.Module) -> Iterator[tuple[str, Draw]]:
    """For every parameter, a function that draws it from the default distribution of its layer.

    Linear and convolution: uniform in +-1/sqrt(fan_in), which is kaiming_uniform_(a=sqrt(5)); norms: ones and zeros;
    embeddings: normal of CLIP's 0.02 rather than PyTorch's 1, so that the positions are not all there is to hear.
    """
    from torch import nn

    for path, layer in module.named_modules():
        for leaf, parameter in layer.named_parameters(recurse=False):
            yield f"{path}.{leaf}", _initialiser(layer, leaf, tuple(parameter.shape), nn)


def _initialiser(layer: nn.Module, leaf: str, shape: tuple[int, ...], nn: Any) -> Draw:
    if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
        return lambda _: np.full(shape, 1.0 if leaf == "weight" else 0.0, np.float32)
    if isinstance(layer, nn.Embedding):
        return lambda random: random.standard_normal(shape, np.float32) * np.float32(0.02)
    if isinstance(layer, nn.Linear | nn.Conv2d):
        bound = 1 / math.sqrt(math.prod(layer.weight.shape[1:]))
        return lambda random: (random.random(shape, np.float32) * 2 - 1) * np.float32(bound)
    raise TypeError(f"no initialisation is known for {type(layer).__name__}.{leaf}")


def write_tokenizer(folder: Path) -> None:
    """The demo's tokenizer with CLIP's ids for the start and the end of a text."""
    shutil.copytree(DEMO_FOLDER / "tokenizer", folder)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps(json.loads(vocabulary.read_text()) | SPECIAL_IDS, ensure_ascii=False))
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"] |= SPECIAL_IDS
    for token in tokenizer["added_tokens"]:
        token["id"] = SPECIAL_IDS[token["content"]]
    _renumber(tokenizer["post_processor"])
    file.write_text(json.dumps(tokenizer, ensure_ascii=False))


def _renumber(processor: dict[str, Any]) -> None:
    if processor["type"] != "RobertaProcessing":
        raise ValueError(f"the demo's tokenizer ends in a {processor['type']}, not in RobertaProcessing")
    processor["cls"] = [processor["cls"][0], SPECIAL_IDS[processor["cls"][0]]]
    processor["sep"] = [processor["sep"][0], SPECIAL_IDS[processor["sep"][0]]]


if __name__ == "__main__":
    main()
