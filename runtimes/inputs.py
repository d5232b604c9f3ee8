"""From the inputs that PyTorch's modules take to those that a runtime's model takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..stages.artifacts import TensorSpec
from ..stages.errors import FeedError
from .protocol import Array, Feeds

TIMESTEP_EMBEDDING: Final = "timestep_embedding"
TIME_IDS_EMBEDDING: Final = "time_ids_embedding"  # the same sinusoid of each of SDXL's time ids, one after the other
END_OF_TEXT: Final = "end_of_text"  # float32 [1, 77]: 1 where the text ends, 0 elsewhere
_TIMESTEP: Final = TensorSpec("timestep", "float32", ())
_TIME_IDS: Final = TensorSpec("time_ids", "float32", (1, 6))
MAX_PERIOD: Final = 10000.0  # wavelengths run from 2π to 2π·10000, "Attention Is All You Need" 3.5, as in diffusers


def timestep_embedding(
    timestep: float, dim: int, *, flip_sin_to_cos: bool, freq_shift: float, max_period: float = MAX_PERIOD
) -> NDArray[np.float32]:
    """The sinusoid that a diffusion UNet reads its time from.

    Computed here in float64 because timestep * frequency reaches 999, where float16 steps are half a radian wide:
    a phone that runs the UNet in float16 would see noise. diffusers `get_timestep_embedding`.

    Args:
        timestep: 0 to 999, as the schedule gives it.
        dim: even, the UNet's first `block_out_channels`.
    Returns:
        [1, dim]: cosines then sines when `flip_sin_to_cos`, else sines then cosines.
    """
    half = dim // 2
    frequency = np.exp(-math.log(max_period) * np.arange(half, dtype=np.float64) / (half - freq_shift))
    # float32 frequencies and products, then exact sines: what PyTorch computes to within its own rounding
    angle = (np.float32(timestep) * frequency.astype(np.float32)).astype(np.float64)
    parts = (np.cos(angle), np.sin(angle)) if flip_sin_to_cos else (np.sin(angle), np.cos(angle))
    return np.concatenate(parts)[None].astype(np.float32)


def time_embedding_facts(unet_config: Mapping[str, Any]) -> dict[str, Any]:
    """What an app must know to compute `timestep_embedding`, from a UNet's config; kept in the manifest."""
    return {
        "dim": int(unet_config["block_out_channels"][0]),
        "flip_sin_to_cos": bool(unet_config.get("flip_sin_to_cos", True)),
        "freq_shift": float(unet_config.get("freq_shift", 0)),
        "max_period": MAX_PERIOD,
    }


def time_ids_embedding(time_ids: Array, width: int, time_embedding: Mapping[str, Any]) -> NDArray[np.float32]:
    """The sinusoids of SDXL's time ids, [1, width], as wide as the model takes; facts as for the timestep."""
    ids = [float(value) for value in time_ids.reshape(-1)]
    facts = {**time_embedding, "dim": width // len(ids)}
    return np.concatenate([timestep_embedding(value, **facts) for value in ids], axis=1)


def end_of_text(input_ids: Array) -> NDArray[np.float32]:
    """1 at the first of the largest ids of [1, tokens], which is CLIP's end token, and 0 elsewhere."""
    found = np.zeros(input_ids.shape, np.float32)
    found[0, int(input_ids[0].argmax())] = 1.0
    return found


def native_feeds(feeds: Feeds, inputs: Iterable[TensorSpec], time_embedding: Mapping[str, Any]) -> dict[str, Array]:
    """Feeds by PyTorch's names and dtypes -> feeds for a model with `inputs`.

    `timestep` becomes `timestep_embedding`, `time_ids` become `time_ids_embedding`, `input_ids` also give
    `end_of_text`, and integers take the width that the model declares; all else is passed as it is, and checked by
    the session.
    """
    native: dict[str, Array] = {}
    for spec in inputs:
        if spec.name == TIMESTEP_EMBEDDING and "timestep" in feeds:
            native[spec.name] = timestep_embedding(float(feeds["timestep"]), **time_embedding)
        elif spec.name == TIME_IDS_EMBEDDING and "time_ids" in feeds:
            native[spec.name] = time_ids_embedding(feeds["time_ids"], spec.shape[-1], time_embedding)
        elif spec.name == END_OF_TEXT and "input_ids" in feeds:
            native[spec.name] = end_of_text(feeds["input_ids"])
        elif spec.name not in feeds:
            raise FeedError(f"no {spec.name!r} among the feeds {sorted(feeds)}")
        elif np.issubdtype(feeds[spec.name].dtype, np.integer) and spec.dtype in ("int32", "int64"):
            native[spec.name] = feeds[spec.name].astype(spec.dtype)
        else:
            native[spec.name] = feeds[spec.name]
    return native


def pytorch_inputs(inputs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    """What `native_feeds` must be given for a model with `inputs`, by PyTorch's names."""
    host = {TIMESTEP_EMBEDDING: _TIMESTEP, TIME_IDS_EMBEDDING: _TIME_IDS}
    return tuple(host.get(spec.name, spec) for spec in inputs if spec.name != END_OF_TEXT)
