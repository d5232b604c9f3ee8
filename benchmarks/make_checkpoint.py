"""Write a checkpoint with the shapes of a published model and random weights, for measuring time and memory.

    python benchmarks/make_checkpoint.py sd15|sd21|sdxl|sd15-controlnet PLACE [--fp16] [--seed N]

PLACE is a folder (the layout of diffusers), or a `.safetensors` file (one file with the key names of the original
code). With --fp16 sd15 takes 2.1 GB, sd21 2.5 GB, sdxl 6.9 GB; twice that without; sd15-controlnet is a ControlNet
alone of 0.7 GB, a folder for --controlnet. It is written tensor by tensor: modules are built on the meta device and
each weight is drawn from PyTorch's default distribution for its layer, so activations keep a sane scale. The folders'
tokenizers are the demo checkpoint's, with CLIP's ids for its two special tokens: they make valid prompts, not SD's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from diffusette.checkpoints.checkpoint import DEMO_FOLDER
from numpy.typing import NDArray

VOCABULARY: Final = 49408
SPECIAL_IDS: Final = {"<|startoftext|>": VOCABULARY - 2, "<|endoftext|>": VOCABULARY - 1}
_STORED: Final[dict[str, np.dtype[Any]]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}

# The configs as the models' authors published them; what they leave out is the default of the class.
_UNET: Final[dict[str, Any]] = {
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
_VAE: Final[dict[str, Any]] = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_TEXT_ENCODER: Final[dict[str, Any]] = {
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
_OPEN_CLIP: Final = {"hidden_act": "gelu", "pad_token_id": 0}
_BETAS: Final = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}

_OF_UNET_ALONE: Final = ("out_channels", "up_block_types", "sample_size")
_CONTROLNET: Final[dict[str, Any]] = {
    **{key: value for key, value in _UNET.items() if key not in _OF_UNET_ALONE},
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
}

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "sd15-controlnet": {"controlnet": _CONTROLNET},
    "sd15": {
        "pipeline": "StableDiffusionPipeline",
        "text_encoder": _TEXT_ENCODER,
        "unet": _UNET,
        "vae": _VAE,
        "scheduler": {"_class_name": "DDIMScheduler", **_BETAS, "clip_sample": False, "set_alpha_to_one": False},
    },
    "sd21": {
        "pipeline": "StableDiffusionPipeline",
        "text_encoder": {
            **_TEXT_ENCODER,
            **_OPEN_CLIP,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
            "projection_dim": 512,
        },
        "unet": {
            **_UNET,
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        "vae": {**_VAE, "sample_size": 768},
        "scheduler": {
            "_class_name": "DDIMScheduler",
            **_BETAS,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "prediction_type": "v_prediction",
        },
    },
    "sdxl": {
        "pipeline": "StableDiffusionXLPipeline",
        # 2 is what is published: the end of the text is then its largest id
        "text_encoder": {**_TEXT_ENCODER, "projection_dim": 768, "eos_token_id": 2},
        "text_encoder_2": {
            **_TEXT_ENCODER,
            **_OPEN_CLIP,
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 20,
            "num_hidden_layers": 32,
            "projection_dim": 1280,
            "eos_token_id": 2,
        },
        "unet": {
            **_UNET,
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        "scheduler": {"_class_name": "EulerDiscreteScheduler", **_BETAS, "timestep_spacing": "leading"},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", choices=SHAPES)
    parser.add_argument("place", type=Path)
    parser.add_argument("--fp16", action="store_true", help="store weights as float16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shapes = SHAPES[options.shapes]
    write = write_file if options.place.suffix == ".safetensors" else write_folder
    if "controlnet" in shapes:
        write = write_controlnet
    write(shapes, options.place, "F16" if options.fp16 else "F32", options.seed)


def build_modules(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The modules on the meta device, by the names of their folders."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        modules: dict[str, Any] = {"text_encoder": CLIPTextModel(CLIPTextConfig(**shapes["text_encoder"]))}
        modules["unet"] = UNet2DConditionModel.from_config(shapes["unet"])  # type: ignore[no-untyped-call]
        modules["vae"] = AutoencoderKL.from_config(shapes["vae"])  # type: ignore[no-untyped-call]
        if "text_encoder_2" in shapes:
            modules["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**shapes["text_encoder_2"]))
    return modules


def write_folder(shapes: Mapping[str, Any], folder: Path, dtype: str, seed: int) -> None:
    """Write the layout of diffusers. `folder` must not exist; `dtype` is safetensors' word, F32 or F16."""
    folder.mkdir(parents=True)
    index: dict[str, Any] = {"_class_name": shapes["pipeline"], "_diffusers_version": "0.19.0"}
    for number, (name, module) in enumerate(build_modules(shapes).items()):
        encodes = name.startswith("text_encoder")
        (module.config.save_pretrained if encodes else module.save_config)(folder / name)
        stem = "model" if encodes else "diffusion_pytorch_model"
        tensors = dict(module.named_parameters())
        count = write_weights(
            folder / name / f"{stem}.safetensors", tensors, dtype, np.random.default_rng([seed, number])
        )
        print(f"{name}: {count / 1e6:.1f}M parameters")
        index[name] = ["transformers" if encodes else "diffusers", type(module).__name__]
        if encodes:
            tokenizer = name.replace("text_encoder", "tokenizer")
            write_tokenizer(folder / tokenizer, pad="!" if shapes[name]["pad_token_id"] == 0 else None)
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(shapes["scheduler"], indent=2))
    index["scheduler"] = ["diffusers", shapes["scheduler"]["_class_name"]]
    if "text_encoder_2" in shapes:
        index["force_zeros_for_empty_prompt"] = True
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def write_controlnet(shapes: Mapping[str, Any], folder: Path, dtype: str, seed: int) -> None:
    """Write the folder of a ControlNetModel. What training begins at zero is random: what it adds must be seen."""
    import torch
    from diffusers import ControlNetModel

    folder.mkdir(parents=True)
    with torch.device("meta"):
        module: Any = ControlNetModel.from_config(shapes["controlnet"])  # type: ignore[no-untyped-call]
    module.save_config(folder)
    tensors = dict(module.named_parameters())
    file = folder / "diffusion_pytorch_model.safetensors"
    count = write_weights(file, tensors, dtype, np.random.default_rng(seed))
    print(f"controlnet: {count / 1e6:.1f}M parameters")


def write_file(shapes: Mapping[str, Any], file: Path, dtype: str, seed: int) -> None:
    """Write one file with the key names of the original code, which the tests spell out."""
    spec = importlib.util.spec_from_file_location("ldm", Path(__file__).parents[1] / "tests" / "ldm.py")
    assert spec
    assert spec.loader
    names = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(names)
    tensors = names.ldm_tensors(SimpleNamespace(**build_modules(shapes)))
    count = write_weights(file, tensors, dtype, np.random.default_rng(seed))
    print(f"{file.name}: {count / 1e6:.1f}M values")


def write_weights(file: Path, tensors: Mapping[str, Any], dtype: str, random: np.random.Generator) -> int:
    """Draw and write every tensor of `tensors` (of them names and shapes count), one in memory at a time.

    Integers, which are positions, are written as they are. Returns how many values were written.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    whole = {name: tensor.numpy() for name, tensor in tensors.items() if not tensor.is_floating_point()}
    stored = _STORED[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * (8 if name in whole else stored.itemsize)
        header[name] = {"dtype": "I64" if name in whole else dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # the format's own padding, so that tensors are aligned
    with file.open("xb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for name in shapes:
            values = whole[name] if name in whole else draw(name, shapes, random).astype(stored)
            stream.write(values.tobytes())
    return sum(map(math.prod, shapes.values()))


def draw(name: str, shapes: Mapping[str, tuple[int, ...]], random: np.random.Generator) -> NDArray[np.float32]:
    """Draw a tensor from the default distribution of its layer, told by its name and by its neighbour's shape.

    Linear and convolution: uniform in +-1/sqrt(fan_in), which is kaiming_uniform_(a=sqrt(5)); norms: ones and zeros;
    embeddings: normal of CLIP's 0.02 rather than PyTorch's 1, so that the positions are not all there is to hear.
    """
    shape = shapes[name]
    if re.search(r"(token|position)_embedding\.weight$|positional_embedding$", name):
        return random.standard_normal(shape, np.float32) * np.float32(0.02)
    kernel = shapes.get(re.sub(r"bias$", "weight", name), ())
    if len(kernel) < 2:
        return np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
    bound = 1 / math.sqrt(math.prod(kernel[1:]))
    return (random.random(shape, np.float32) * 2 - 1) * np.float32(bound)


def write_tokenizer(folder: Path, pad: str | None = None) -> None:
    """The demo's tokenizer with CLIP's ids for the start and the end of a text, filled up with `pad`."""
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
    if pad:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            stated = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(stated | {"pad_token": pad}))


def _renumber(processor: dict[str, Any]) -> None:
    if processor["type"] != "RobertaProcessing":
        raise ValueError(f"the demo's tokenizer ends in a {processor['type']}, not in RobertaProcessing")
    processor["cls"] = [processor["cls"][0], SPECIAL_IDS[processor["cls"][0]]]
    processor["sep"] = [processor["sep"][0], SPECIAL_IDS[processor["sep"][0]]]


if __name__ == "__main__":
    main()
