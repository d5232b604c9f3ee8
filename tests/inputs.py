"""Every form in which people hand a model over: layouts of checkpoints, and what is given beside them.

`INPUTS[name].make(folder)` writes the files and says what to give to `convert`. Weights are random; each layout has
weights of its own, so that no two of them share more than the structure of a graph. Written by diffusers, transformers
and PEFT themselves, single files by `ldm`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from diffusette.checkpoints.checkpoint import DEMO_FOLDER
from diffusette.stages.artifacts import ALONE, Companions
from safetensors.torch import save_file

from .adapters import ATTENTION, WITH_CONVOLUTIONS, adapt, random_lora, save_peft
from .kinds import kind_pipeline, tiny_decoder
from .ldm import ldm_tensors, ldm_vae, original_pipeline, with_ema, write_ldm

TOKENIZER: Final = DEMO_FOLDER / "tokenizer"
WORD: Final = "<toy>"
V_YAML: Final = (
    "model: {params: {parameterization: v, linear_start: 0.00085, linear_end: 0.012, scale_factor: 0.18215}}"
)


@dataclass(frozen=True)
class Given:
    """What a user types: a path, and options."""

    checkpoint: Path
    companions: Companions = ALONE


@dataclass(frozen=True)
class Input:
    """A row of the table in docs/kinds.md."""

    title: str
    base: str  # the kind of checkpoint
    make: Callable[[Path], Given]
    merged: bool = False  # into the weights, before any target sees them


def _jolt(pipeline: Any, seed: int) -> Any:
    """`pipeline` with weights of its own: every one moved by a twentieth of its size."""
    generator = torch.Generator().manual_seed(seed)
    for part in ("text_encoder", "text_encoder_2", "unet", "vae"):
        module = getattr(pipeline, part, None)
        if module is not None:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    return pipeline


def _folder(
    kind: str, seed: int, dtype: torch.dtype = torch.float32, rename: Mapping[str, str] | None = None, **save: Any
) -> Callable[[Path], Given]:
    """A diffusers folder as save_pretrained writes it; `rename` moves files afterwards."""

    def make(folder: Path) -> Given:
        _jolt(kind_pipeline(kind), seed).to(dtype).save_pretrained(folder / "model", **save)
        for old, new in (rename or {}).items():
            (folder / "model" / old).rename(folder / "model" / new)
        return Given(folder / "model")

    return make


def _file(
    kind: str,
    suffix: str,
    seed: int,
    dtype: torch.dtype = torch.float32,
    averaged: bool = False,
    metadata: dict[str, str] | None = None,
    yaml: str = "",
    vae_apart: bool = False,
    unet: Mapping[str, Any] | None = None,
    **companions: Any,
) -> Callable[[Path], Given]:
    """A single file of the original code; `averaged` adds EMA weights, `unet` changes the UNet's configuration."""

    def make(folder: Path) -> Given:
        pipeline = _jolt(original_pipeline(kind, **(unet or {})), seed)
        tensors = ldm_tensors(pipeline)
        if averaged:
            tensors = with_ema(tensors, lambda values: values * 1.1)
        given = dict(companions)
        if vae_apart:
            tensors = {name: values for name, values in tensors.items() if not name.startswith("first_stage_model.")}
            pipeline.vae.to(dtype).save_pretrained(folder / "vae")
            given["vae"] = folder / "vae"
        file = write_ldm(folder / f"model{suffix}", tensors, dtype, metadata)
        if yaml:
            file.with_suffix(".yaml").write_text(yaml)
        for name in ("tokenizer", *(["tokenizer_2"] if kind == "sdxl" else [])):
            shutil.copytree(TOKENIZER, folder / name)  # the vocabulary is not CLIP's
        return Given(file, Companions(**given))

    return make


def _vae_beside(folder: Path) -> Given:
    """The VAE as one file with the original names, as model sites have it, beside a diffusers folder."""
    pipeline = kind_pipeline("sd2")
    pipeline.save_pretrained(folder / "model")
    other = _jolt(original_pipeline("sd1"), 9).vae
    save_file({n: v.contiguous() for n, v in ldm_vae(other, "").items()}, folder / "vae.safetensors")
    return Given(folder / "model", Companions(vae=folder / "vae.safetensors"))


def _tiny(kind: str) -> Callable[[Path], Given]:
    def make(folder: Path) -> Given:
        kind_pipeline(kind).save_pretrained(folder / "model")
        tiny_decoder().save_pretrained(folder / "taesd")
        return Given(folder / "model", Companions(vae_decoder=folder / "taesd"))

    return make


def _adapted(kind: str, write: Callable[[Any, Path], list[tuple[Path, float]]]) -> Callable[[Path], Given]:
    def make(folder: Path) -> Given:
        pipeline = kind_pipeline(kind)
        pipeline.save_pretrained(folder / "model")
        return Given(folder / "model", Companions(adapters=tuple(write(pipeline, folder))))

    return make


def _peft(adapter: str) -> Callable[[Path], Given]:
    return _adapted(
        "sd1", lambda made, folder: [(save_peft(adapt(made.unet, adapter), adapter, folder / adapter), 1.0)]
    )


def _saved(folder: Path, name: str, state: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(dict(state), folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def _kohya(made: Any, folder: Path) -> list[tuple[Path, float]]:
    state = random_lora(made.unet, WITH_CONVOLUTIONS, "lora_unet_")
    state |= random_lora(made.text_encoder, r".*\.(q_proj|fc1|out_proj)", "lora_te_", text=True)
    return [(_saved(folder, "style", state), 0.8)]


def _kohya_of_sdxl(made: Any, folder: Path) -> list[tuple[Path, float]]:
    """Under today's names; those of the original UNet are tested in tests/checkpoints/test_adapters.py."""
    state = random_lora(made.unet, ATTENTION, "lora_unet_")
    for prefix, encoder in (("lora_te1_", made.text_encoder), ("lora_te2_", made.text_encoder_2)):
        state |= random_lora(encoder, r".*\.(q_proj|fc1)", prefix, text=True)
    return [(_saved(folder, "style", state), 0.8)]


def _by_diffusers(made: Any, folder: Path) -> list[tuple[Path, float]]:
    """What diffusers' own training scripts save, by its own writer."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    adapted = adapt(made.unet, "lora")
    StableDiffusionPipeline.save_lora_weights(
        folder / "trained",
        unet_lora_layers=get_peft_model_state_dict(adapted),
        **_collate_lora_metadata({"unet": adapted}),
    )
    return [(folder / "trained", 1.0)]


def _several(made: Any, folder: Path) -> list[tuple[Path, float]]:
    one = _saved(folder, "one", random_lora(made.unet, WITH_CONVOLUTIONS, "lora_unet_"))
    two = _saved(folder, "two", random_lora(made.unet, ATTENTION, "lora_unet_", rank=2, alpha=None, seed=9))
    return [(one, 0.7), (two, -0.5), (save_peft(adapt(made.unet, "oft"), "oft", folder / "turned"), 1.0)]


def _lycoris_oft(made: Any, folder: Path) -> list[tuple[Path, float]]:
    generator = torch.Generator().manual_seed(4)
    state = {}
    for name, module in made.unet.named_modules():
        if re.fullmatch(ATTENTION, name):
            flat, blocks = "lora_unet_" + name.replace(".", "_"), module.weight.shape[0] // 4
            state[f"{flat}.oft_blocks"] = torch.randn(blocks, 4, 4, generator=generator) * 0.2
            state[f"{flat}.alpha"] = torch.tensor(0.0)
    return [(_saved(folder, "turned", state), 1.0)]


def _differences(made: Any, folder: Path) -> list[tuple[Path, float]]:
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, module in made.unet.named_modules():
        if name.endswith(".conv1"):
            flat = "lora_unet_" + name.replace(".", "_")
            state[f"{flat}.diff"] = 0.05 * torch.randn(module.weight.shape, generator=generator)
            state[f"{flat}.diff_b"] = 0.05 * torch.randn(module.bias.shape, generator=generator)
    return [(_saved(folder, "whole", state), 0.5)]


def _lcm_lora(made: Any, folder: Path) -> list[tuple[Path, float]]:
    """As latent-consistency/lcm-lora-sdv1-5 is published: diffusers' file name in a folder that says what it is."""
    state = random_lora(made.unet, WITH_CONVOLUTIONS, "lora_unet_")
    return [(_saved(folder / "lcm-lora-sdv1-5", "pytorch_lora_weights", state), 1.0)]


def _words(made: Any, folder: Path) -> list[tuple[Path, float]]:
    """One word of one vector in diffusers' key, one of three in A1111's, named by its file."""
    generator = torch.Generator().manual_seed(2)
    width = made.text_encoder.config.hidden_size
    toy = _saved(folder, "learned_embeds", {WORD: torch.randn(width, generator=generator)})
    blurry = _saved(folder, "blurry", {"emb_params": torch.randn(3, width, generator=generator)})
    return [(toy, 1.0), (blurry, 1.0)]


def _words_of_sdxl(made: Any, folder: Path) -> list[tuple[Path, float]]:
    generator = torch.Generator().manual_seed(2)
    parts = {"clip_l": made.text_encoder, "clip_g": made.text_encoder_2}
    state = {key: torch.randn(2, part.config.hidden_size, generator=generator) for key, part in parts.items()}
    return [(_saved(folder, "toy", state), 1.0)]


UNET: Final = "unet/diffusion_pytorch_model"
_V: Final = {"modelspec.prediction_type": "v"}
_HALF, _BRAIN = torch.float16, torch.bfloat16

INPUTS: Final[dict[str, Input]] = {
    # layouts
    "folder-fp16": Input("diffusers folder, `fp16` variant only", "sd1", _folder("sd1", 1, _HALF, variant="fp16")),
    "folder-bf16": Input("diffusers folder in bfloat16", "sd2, predicts v", _folder("sd2", 2, _BRAIN)),
    "folder-non-ema": Input(
        "diffusers folder, of the UNet a `non_ema` variant only",
        "sd1",
        _folder("sd1", 3, rename={f"{UNET}.safetensors": f"{UNET}.non_ema.safetensors"}),
    ),
    "folder-sharded": Input("diffusers folder in shards", "sd2, predicts v", _folder("sd2", 4, max_shard_size="60KB")),
    "folder-sharded-fp16": Input(
        "diffusers folder in shards of an `fp16` variant",
        "sdxl",
        _folder("sdxl", 5, _HALF, variant="fp16", max_shard_size="60KB"),
    ),
    "folder-vae": Input("diffusers folder, VAE apart in a file (`--vae`)", "sd2, predicts v", _vae_beside),
    "file-sd1": Input(
        "`.safetensors` in float16 that holds averaged weights too", "sd1", _file("sd1", ".safetensors", 6, _HALF, True)
    ),
    "file-sd1-ema": Input(
        "`.ckpt` in float32, its averaged weights (`--ema`)", "sd1", _file("sd1", ".ckpt", 7, averaged=True, ema=True)
    ),
    "file-sd1-pt": Input("`.pt` in bfloat16", "sd1", _file("sd1", ".pt", 8, _BRAIN)),
    "file-inpainting": Input(
        "`.ckpt` in float16", "sd1, inpainting", _file("sd1", ".ckpt", 9, _HALF, unet={"in_channels": 9})
    ),
    "file-lcm": Input(
        "`.safetensors` in float16",
        "sd1, LCM",
        _file("sd1", ".safetensors", 10, _HALF, unet={"time_cond_proj_dim": 32}),
    ),
    "file-sd2": Input(
        "`.safetensors` in bfloat16, metadata say v",
        "sd2, predicts v",
        _file("sd2", ".safetensors", 11, _BRAIN, metadata=_V),
    ),
    "file-sd2-ckpt": Input(
        "`.ckpt` in float32 with averaged weights, a YAML beside it says v",
        "sd2, predicts v",
        _file("sd2", ".ckpt", 12, averaged=True, yaml=V_YAML),
    ),
    "file-sd2-base": Input(
        "`.safetensors` in float16, `--prediction epsilon`",
        "sd2, predicts noise",
        _file("sd2", ".safetensors", 13, _HALF, prediction="epsilon"),
    ),
    "file-sdxl": Input("`.safetensors` in float16", "sdxl", _file("sdxl", ".safetensors", 14, _HALF)),
    "file-sdxl-vae": Input(
        "`.safetensors` in bfloat16 without VAE, VAE apart in a folder (`--vae`)",
        "sdxl",
        _file("sdxl", ".safetensors", 15, _BRAIN, vae_apart=True),
    ),
    "taesd": Input("tiny decoder (`--vae-decoder`): TAESD", "sd1", _tiny("sd1")),
    "taesdxl": Input("tiny decoder (`--vae-decoder`): TAEXL", "sdxl", _tiny("sdxl")),
    # adapters
    "lora-peft": Input("LoRA, folder of PEFT", "sd1", _peft("lora"), True),
    "lora-diffusers": Input("LoRA, folder of diffusers", "sd1", _adapted("sd1", _by_diffusers), True),
    "lora-kohya": Input(
        "LoRA of kohya with convolutions and text encoder, at 0.8", "sd1", _adapted("sd1", _kohya), True
    ),
    "lora-kohya-sdxl": Input(
        "LoRA of kohya with both text encoders, at 0.8", "sdxl", _adapted("sdxl", _kohya_of_sdxl), True
    ),
    "dora": Input("DoRA, folder of PEFT", "sd1", _peft("dora"), True),
    "loha": Input("LoHa, folder of PEFT", "sd1", _peft("loha"), True),
    "lokr": Input("LoKr, folder of PEFT", "sd1", _peft("lokr"), True),
    "oft": Input("OFT, folder of PEFT", "sd1", _peft("oft"), True),
    "oft-lycoris": Input("OFT of LyCORIS", "sd1", _adapted("sd1", _lycoris_oft), True),
    "boft": Input("BOFT, folder of PEFT", "sd1", _peft("boft"), True),
    "differences": Input(
        "whole differences of LyCORIS (`diff`, `diff_b`), at 0.5", "sd1", _adapted("sd1", _differences), True
    ),
    "several": Input("two LoRAs at 0.7 and -0.5, and an OFT", "sd1", _adapted("sd1", _several), True),
    "lcm-lora": Input("LCM-LoRA", "sd1", _adapted("sd1", _lcm_lora), True),
    "words": Input("textual inversions of one and of three vectors", "sd1", _adapted("sd1", _words)),
    "words-sdxl": Input("textual inversion for both text encoders", "sdxl", _adapted("sdxl", _words_of_sdxl)),
}
