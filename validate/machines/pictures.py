"""One picture of a bundle, drawn with its models on another machine, held against PyTorch's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...bundle.bundle import open_bundle
from ...bundle.manifest import Manifest
from ...bundle.sessions import painter
from ...export.compiled_schedule import CompiledSchedule
from ...runtimes.machines.machine import Machine
from ...runtimes.protocol import Array
from ...runtimes.txt2img.generate import draw
from ...stages.hashing import sha256_of_json
from ...stages.stage import Stage
from ..gates import Drawn, compare_pictures
from ..reference.probes import Probes, pictures_for
from ..report import PictureReport
from .stages import MachineKey, open_on

_IMAGE: Final = "image.npy"
# What says nothing about what is drawn, or is measured anew by each conversion.
_IRRELEVANT: Final = {"arithmetic", "assets", "gate", "memory", "name", "parity", "provenance", "recipe", "speed"}


def drawing_facts(manifest: Manifest) -> str:
    """A digest of all in a manifest that decides what its bundle draws."""
    return sha256_of_json(manifest.model_dump(mode="json", exclude=_IRRELEVANT))


@dataclass(frozen=True, slots=True)
class PictureOnMachine:
    """What came of `DrawOnMachine`."""

    folder: Path
    report: PictureReport
    digest: str = ""

    def image(self) -> Array:
        """[H, W, 3] in 0..1, before rounding to 8 bits."""
        return np.asarray(np.load(self.folder / _IMAGE))


@dataclass(frozen=True)
class DrawOnMachine(
    Stage[PictureOnMachine],
    name="picture on machine",
    version=1,
    tools=("numpy", "tokenizers", "scikit-image"),
    aside=("bundle", "machine"),
):
    """Draw the picture of one prompt of a plan and compare it, step by step and in pixels.

    Args:
        facts: `drawing_facts` of the bundle.
        arithmetics: component -> name of the arithmetic it is opened in.
        probes: PyTorch's pictures.
        index: of the plan's prompt.
    """

    bundle: Path
    facts: str
    schedule: CompiledSchedule
    arithmetics: Mapping[str, str]
    machine: Machine
    key_of_machine: MachineKey
    probes: Probes
    index: int = 0
    threads: int = 2

    def run(self, into: Path) -> PictureOnMachine:
        bundle = open_bundle(self.bundle)
        models = replace(
            painter(bundle, self.schedule, self.threads),
            open=lambda name: open_on(self.machine, bundle.model(name), self.arithmetics[name], self.threads),
        )
        picture = next(picture for at, picture in enumerate(self.probes.pictures()) if at == self.index)
        how: dict[str, Any] = {"guidance": self.probes.plan.guidance, "seed": picture.seed, **pictures_for(models)}
        result = draw(models, picture.prompt, keep_trajectory=True, **how)
        np.save(into / _IMAGE, result.image)
        return PictureOnMachine(into, compare_pictures(picture, Drawn(result.trajectory, result.image)))
