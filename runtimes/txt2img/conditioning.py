"""What a UNet is told beside latents and time, made of what the text encoders give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...stages.errors import BundleError

Floats = NDArray[np.float32]

ENCODERS: Final = ("text_encoder", "text_encoder_2")  # in the order in which their states stand side by side
_STATES: Final = ("last_hidden_state", "penultimate_hidden_state")
_POOLED: Final = "text_embeds"
GUIDANCE_INPUT: Final = "timestep_cond"  # optimum's name for an embedded guidance scale


def conditioning(outputs: Sequence[Mapping[str, Floats]], size: tuple[int, int]) -> dict[str, Floats]:
    """The UNet's feeds of one prompt, by PyTorch's names.

    Args:
        outputs: of each text encoder, in the order of `ENCODERS`.
        size: height and width of the picture in pixels; Stable Diffusion XL is told that nothing was cropped.
    Raises:
        BundleError: a text encoder gives no hidden states.
    """
    states = []
    for given in outputs:
        found = next((given[name] for name in _STATES if name in given), None)
        if found is None:
            raise BundleError(f"a text encoder gives {', '.join(given)}, and none of {', '.join(_STATES)}")
        states.append(found)
    feeds = {"encoder_hidden_states": np.concatenate(states, axis=-1)}
    if _POOLED in outputs[-1]:
        feeds |= {_POOLED: outputs[-1][_POOLED], "time_ids": time_ids(size)}
    return feeds


def zeroed(feeds: Mapping[str, Floats]) -> dict[str, Floats]:
    """The feeds of "nothing" where a pipeline takes zeros for an empty negative prompt (SDXL)."""
    kept = ("time_ids",)
    return {name: value if name in kept else np.zeros_like(value) for name, value in feeds.items()}


def time_ids(size: tuple[int, int]) -> Floats:
    """Original height and width, the crop's top and left, target height and width: [1, 6] (Podell et al. 2023, 2.2)."""
    return np.array([[*size, 0, 0, *size]], np.float32)
