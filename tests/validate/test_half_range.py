"""Which modules come near float16's end is said before they overflow: on SDXL's parts, whose VAE is known for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.export import contract
from diffusette.validate.layers.of_bundle import ranges_of
from diffusette.validate.layers.points import Points, find_points, hooks
from diffusette.validate.layers.report import FLOAT16_MAX, NEAR, ComponentLayers
from diffusette.validate.layers.trace import Peaks, peaks_of
from diffusette.validate.reference.torch_session import TorchModel, TorchSession

SIZE: Final = (64, 64)
# what follows each is a normalisation, so that only its own result grows with its weights
PARTS: Final = (
    ("vae_decoder", "decoder.up_blocks.1.resnets.0.conv1"),
    ("unet", "down_blocks.1.resnets.0.conv1"),
)


class Part:
    """A component of the tiny SDXL, and what its inputs are."""

    def __init__(self, folder: Path, component: str) -> None:
        source = open_checkpoint(folder).components[component]
        self.component = component
        self.points, self.events = find_points(source, SIZE)
        self.session = TorchSession(TorchModel(source, SIZE))
        rng = np.random.default_rng(3)
        self.feeds = {
            spec.name: (
                np.float32(500.0) if spec.name == "timestep" else rng.normal(size=spec.shape).astype(np.float32)
            )
            for spec in contract.input_specs(source, SIZE)
        }

    def found(self) -> ComponentLayers:
        peaks = peaks_of(self.session, self.feeds, self.events, len(self.points))
        points = Points(Path(), self.points, self.events)
        ranges = ranges_of(points, Peaks(Path(), tuple(peaks), (0,) * len(peaks)), ["a probe"])
        return ComponentLayers(self.component, "fp32", "a probe", (), ranges, 100.0, 1, 1.0)

    def scale(self, module: str, factor: float) -> None:
        import torch

        inner: Any = self.session.module.m
        with torch.no_grad():
            for parameter in inner.get_submodule(module).parameters():
                parameter.mul_(factor)

    def overflowing(self) -> list[str]:
        """The modules whose results are not finite when all is computed in float16, in the order of execution."""
        import torch

        named: dict[str, None] = {}

        def leave(path: str, kind: str, tensor: Any) -> None:
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                named[path] = None

        module = self.session.module.half()
        feeds = [torch.from_numpy(np.array(self.feeds[spec.name])).half() for spec in self.session.inputs]
        try:
            with torch.inference_mode(), hooks(module, lambda *_: None, leave):
                module(*feeds)
        finally:
            module.float()
        return list(named)


@pytest.fixture(params=PARTS, ids=lambda pair: pair[0])
def part(request: pytest.FixtureRequest, kind_folder: Callable[[str], Path]) -> tuple[Part, str]:
    component, module = request.param
    return Part(kind_folder("sdxl"), component), module


def test_the_module_that_would_overflow_is_named_while_it_does_not_yet(part: tuple[Part, str]) -> None:
    component, module = part
    plain = component.found()
    assert not any(each.near for each in plain.ranges)
    (before,) = [each.peak for each in plain.ranges if each.module == module]
    component.scale(module, 0.5 * FLOAT16_MAX / before)

    grown = component.found()
    near = [each.module for each in grown.ranges if each.near]
    assert near[0] == module
    assert set(near[1:]) <= {module.rpartition(".")[0]}, "only the UNet's block, which adds the time to it"
    said = grown.ranges_json()[0]
    assert (said["module"], said["op"], said["near"]) == (module, "Conv2d", True)
    assert said["of_fp16"] == pytest.approx(0.5, rel=1e-4)
    assert component.overflowing() == []

    component.scale(module, 4.0)
    assert component.found().largest()[0].module == module
    assert component.overflowing()[0] == module


def test_what_stays_below_an_eighth_is_not_near(part: tuple[Part, str]) -> None:
    component, module = part
    (before,) = [each.peak for each in component.found().ranges if each.module == module]
    component.scale(module, 0.9 * NEAR * FLOAT16_MAX / before)
    assert component.found().largest()[0].module == module
    assert not any(each.near for each in component.found().ranges)
