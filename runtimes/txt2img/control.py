"""Drawing along a picture: what a ControlNet makes of it is added inside the UNet, scaled on the way. numpy only.

What is computed is diffusers' StableDiffusionControlNetPipeline (and its XL, image-to-image and inpainting relatives)
without guess mode: the ControlNet runs in both branches of guidance, with the text of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...export.contract import CONTROL_PICTURE, RESIDUALS_IN, residual_inputs
from ...stages.artifacts import TensorSpec
from ...stages.errors import BundleError, UsageError
from .picture_file import read_pixels

Floats = NDArray[np.float32]

USUAL_SCALE: Final = 1.0  # controlnet_conditioning_scale of diffusers' pipelines


@dataclass(frozen=True, slots=True)
class Control:
    """A picture to draw along: edges, a depth map, whatever the ControlNet was trained on."""

    picture: Floats | None  # [1, 3, H, W], 0..1; may be absent where the scale is 0
    scale: float = USUAL_SCALE  # of what is added; 0: as if there were no ControlNet

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UsageError(f"control scale {self.scale} is not a finite number", hint="1 is usual, 0 switches it off")
        if self.picture is None and self.scale != 0:
            raise UsageError(f"a control scale of {self.scale:g} without a control picture", hint="add --control FILE")


def read_control(file: Path | None, scale: float | None, size: tuple[int, int]) -> Control | None:
    """Read the control picture and bring it to `size` (height, width); None where neither is given.

    Raises:
        UsageError: the file is no picture, or too large, or the scale needs one.
    """
    if file is None and scale is None:
        return None
    picture = None
    if file is not None:
        picture = np.ascontiguousarray(read_pixels(file, "RGB", size).transpose(2, 0, 1)[None])
    return Control(picture, USUAL_SCALE if scale is None else scale)


def refuse_control(control: Control | None, *, controlled: bool, size: tuple[int, int]) -> None:
    """Refuse a control picture that nothing reads, and a ControlNet without one.

    Raises:
        UsageError: says which.
    """
    if control is None:
        if controlled:
            raise UsageError(
                "this bundle needs a control picture (edges, a depth map, ...), and none was given",
                hint="give --control FILE, or --control-scale 0 to draw without",
            )
        return
    if not controlled:
        raise UsageError(
            "there is no ControlNet in this bundle, so it takes no control picture",
            hint="convert the checkpoint with --controlnet PATH, or leave --control and --control-scale out",
        )
    if control.picture is not None and control.picture.shape != (1, 3, *size):
        raise UsageError(f"the control picture is {list(control.picture.shape)}, this bundle draws {[1, 3, *size]}")


def picture_feeds(control: Control) -> dict[str, Floats]:
    """What a ControlNet takes beside the UNet's inputs."""
    return {} if control.picture is None else {CONTROL_PICTURE: control.picture}


def residual_feeds(outputs: Mapping[str, Floats], scale: float) -> dict[str, Floats]:
    """What a ControlNet gave -> what the UNet takes, times `scale`, in float32 as PyTorch multiplies."""
    names = residual_inputs(tuple(outputs))
    return {names[name]: value * np.float32(scale) for name, value in outputs.items()}


def no_residuals(inputs: Sequence[TensorSpec]) -> dict[str, Floats]:
    """What a UNet among whose `inputs` are residuals takes when nothing is to be added.

    Raises:
        BundleError: it takes none.
    """
    found = {spec.name: np.zeros(spec.shape, np.float32) for spec in inputs if spec.name.startswith(RESIDUALS_IN)}
    if not found:
        raise BundleError("there is a ControlNet, but the UNet takes no input from it", hint="convert again")
    return found
