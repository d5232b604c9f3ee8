"""A PyTorch module of the embedded checkpoint behind the protocol of the runtimes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from diffusette.runtimes.protocol import Closing
from diffusette.stages.artifacts import TensorSpec

INPUTS: Final = {
    "text_encoder": (TensorSpec("input_ids", "int64", (1, 77)),),
    "unet": (
        TensorSpec("sample", "float32", (1, 4, 8, 8)),
        TensorSpec("timestep", "float32", ()),
        TensorSpec("encoder_hidden_states", "float32", (1, 77, 128)),
    ),
    "vae_decoder": (TensorSpec("latent_sample", "float32", (1, 4, 8, 8)),),
}


@dataclass
class ModuleSession(Closing):
    """A PyTorch module behind the runtimes' protocol."""

    component: str
    pipeline: Any
    journal: list[str]
    outputs: tuple[TensorSpec, ...] = (TensorSpec("out_sample", "float32", (1, 4, 8, 8)),)  # read of the UNet alone
    inputs: tuple[TensorSpec, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = INPUTS[self.component]
        self.journal.append(f"open {self.component}")

    @torch.no_grad()
    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert {name: (value.dtype.name, value.shape) for name, value in feeds.items()} == {
            spec.name: (spec.dtype, spec.shape) for spec in self.inputs
        }
        self.journal.append(f"run {self.component}")
        x = [torch.from_numpy(np.asarray(feeds[spec.name])) for spec in self.inputs]
        if self.component == "text_encoder":
            return {"last_hidden_state": self.pipeline.text_encoder(x[0])[0].numpy()}
        if self.component == "unet":
            return {"out_sample": self.pipeline.unet(*x, return_dict=False)[0].numpy()}
        return {"sample": self.pipeline.vae.decode(x[0], return_dict=False)[0].numpy()}

    def close(self) -> None:
        self.journal.append(f"close {self.component}")
