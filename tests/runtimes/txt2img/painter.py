"""Tiny checkpoints that draw with PyTorch's own modules, so that whatever differs from diffusers is this package's."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.families.variant import reads_zeros_for_empty
from diffusette.checkpoints.tokenizer import write_tokenizer
from diffusette.export.compile_schedule import compile_schedule
from diffusette.runtimes.inputs import time_embedding_facts
from diffusette.runtimes.txt2img.generate import TextToImage
from diffusette.runtimes.txt2img.tokenizer import PromptTokenizer
from diffusette.stages.artifacts import ALONE, Companions
from diffusette.validate.reference.torch_session import TorchModel, TorchSession

SIZE: Final = (64, 64)


def models_of(
    folder: Path, scheduler: str, steps: int, pipeline: str, scratch: Path, companions: Companions = ALONE
) -> TextToImage:
    """What draws 64 x 64 pictures with the checkpoint in `folder`, each session PyTorch itself."""
    checkpoint = open_checkpoint(folder, companions=companions)
    tokenizers = []
    for source in (checkpoint.tokenizer, checkpoint.tokenizer_2):
        if source is not None:
            into = scratch / source.name
            into.mkdir()
            facts = write_tokenizer(source, into)
            tokenizers.append(PromptTokenizer(into, facts["max_tokens"], facts["pad_id"]))
    vae = checkpoint.components["vae_decoder"].config
    return TextToImage(
        tokenizer=tokenizers[0],
        open=lambda name: TorchSession(TorchModel(checkpoint.components[name], SIZE)),
        schedules=(compile_schedule(checkpoint.scheduler, scheduler, steps, pipeline=pipeline),),
        guidance_mode=checkpoint.variant.guidance_mode,
        default_guidance=5.0,
        scaling_factor=float(vae["scaling_factor"]),
        shift=0.0,
        size=SIZE,
        denoiser="unet",
        time_embedding=time_embedding_facts(checkpoint.components["unet"].config),
        tokenizer_2=tokenizers[1] if len(tokenizers) > 1 else None,
        zeros_for_empty=reads_zeros_for_empty(checkpoint),
        input_channels=checkpoint.variant.input_channels,
        controlled="controlnet" in checkpoint.components,
    )
