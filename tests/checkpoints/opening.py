"""Opening checkpoints, and taking their refusals apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusette.checkpoints.checkpoint import DEMO_FOLDER, open_checkpoint
from diffusette.checkpoints.weights import Weights
from diffusette.stages.artifacts import Checkpoint, Companions
from diffusette.stages.errors import CheckpointError

TOKENIZER = DEMO_FOLDER / "tokenizer"
GIVEN = Companions(tokenizer=TOKENIZER)


def refusal_of(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(path)
    assert refusal.value.hint
    assert refusal.value.exit_code == 4
    return refusal.value.what


def refusal(file: Path, given: Companions = GIVEN) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(file, companions=given, survey=False)
    return caught.value


def assert_weights_are(checkpoint: Checkpoint, pipeline: Any, cast: torch.dtype = torch.float32) -> None:
    """Every weight of every component equals the module's that the file was written from."""
    for name, source in checkpoint.components.items():
        module = pipeline.vae if name.startswith("vae") else getattr(pipeline, name)
        state = {n.removeprefix("text_model."): v for n, v in module.state_dict().items()}
        weights = Weights(source)
        assert weights.names()
        for tensor in weights.names():
            expected = state[tensor.removeprefix("text_model.")].to(cast).float().numpy()
            np.testing.assert_array_equal(weights.read(tensor).astype(np.float32), expected, err_msg=tensor)
        half = {"vae_decoder": ("decoder.", "post_quant"), "vae_encoder": ("encoder.", "quant")}.get(name, ("",))
        # SDXL reads its encoders' states before the last layer, which the first one then needs not hold
        found = {n.removeprefix("text_model.") for n in (*weights.names(), *weights.unused())}
        assert found == {n for n in state if n.startswith(half)}
