"""Adapters merged, and the same adapters live in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.weights import Weights
from diffusette.export.modules import load
from diffusette.stages.artifacts import Checkpoint, Companions
from diffusette.validate.parity import compare

CONV = "down_blocks.0.resnets.0.conv1"
FLAT = "lora_unet_" + CONV.replace(".", "_")
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT_QUERY = "lora_unet_" + QUERY.replace(".", "_")

FLOOR_DB = 100.0  # float32 sums in another order; a wrong scale or a missed module is below 40


def snr_db(reference: torch.Tensor, found: torch.Tensor) -> float:
    return compare(reference.numpy(), found.numpy(), where="test").snr_db


def feeds(unet: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = unet.config.cross_attention_dim
    return (
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.tensor(501.0),
        torch.randn(1, 77, width, generator=generator),
    )


def opened(folder: Path, *adapters: tuple[Path, float]) -> Checkpoint:
    return open_checkpoint(folder, companions=Companions(adapters=adapters), survey=False)


def live_and_merged(folder: Path, adapters: tuple[tuple[Path, float], ...], unet: Any) -> float:
    """Decibels between the live `unet` and the one that `folder` with `adapters` loads as."""
    inputs = feeds(unet)
    with torch.no_grad():
        live = unet.eval()(*inputs, return_dict=False)[0]
        merged = load(opened(folder, *adapters).components["unet"])(*inputs)
        plain = load(opened(folder).components["unet"])(*inputs)
    assert snr_db(live, plain) < 40, "the adapter must matter, or the comparison proves nothing"
    return snr_db(live, merged)


def only(folder: Path, place: Path, parameter: str, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """One parameter before and after an adapter."""
    weights = Weights(opened(folder, (place, scale)).components["unet"])
    return torch.from_numpy(weights.read_unchanged(parameter)), torch.from_numpy(weights.read(parameter))
