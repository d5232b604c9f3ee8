"""Calibration samples: what each component is fed along real denoising trajectories. Plain files, numpy only."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..stages.artifacts import role_of
from ..stages.errors import ModelError
from ..stages.hashing import sha256_of_json

Feeds = Mapping[str, NDArray[Any]]

_FEED: Final = "feed."


@dataclass(frozen=True, slots=True)
class Samples:
    """Folders of `COMPONENT-000.npz`, whose arrays `feed.NAME` are a component's inputs and `output.NAME` its answers.

    They are probes of `validate/reference/pytorch.py`, drawn for other prompts than those of the gates: a method that
    is judged by what it was fitted to proves nothing. One folder holds a few prompts and was made by one stage, so that
    an interrupted calibration goes on with the next prompts.
    """

    folders: tuple[Path, ...]
    digests: tuple[str, ...]  # of the folders, in their order
    # what an error of the UNet counts at each timestep: its share of a step's result, as power; 1 where none is given
    weights: tuple[tuple[float, float], ...] = ()
    # latent rows and columns of the middle that the VAE's samples are cut to; 0 for whole ones
    vae_side: int = 0
    vae_pixels: int = 8  # a latent

    @property
    def digest(self) -> str:
        size = [self.vae_side] if self.vae_pixels == 8 else [self.vae_side, self.vae_pixels]
        return sha256_of_json([list(self.digests), [list(pair) for pair in self.weights], *size])

    def files(self, component: str, at_most: int | None = None) -> tuple[Path, ...]:
        """The component's samples in a fixed order; with `at_most`, so many of them, drawn once and for all.

        Raises:
            ModelError: there are none.
        """
        found = [file for folder in self.folders for file in sorted(folder.glob(f"{component}-*.npz"))]
        if not found:
            raise ModelError(f"there are no calibration samples for {component}", hint="calibrate with more prompts")
        if at_most is not None and len(found) > at_most:
            # not evenly spaced: that would meet the same timestep of every prompt
            found = [found[index] for index in sorted(random.Random(0).sample(range(len(found)), at_most))]
        return tuple(found)

    def feeds(self, component: str, at_most: int | None = None) -> Iterator[Feeds]:
        """The component's inputs, one call at a time."""
        for file in self.files(component, at_most):
            with np.load(file, allow_pickle=False) as stored:
                feeds = {name.removeprefix(_FEED): stored[name] for name in stored.files if name.startswith(_FEED)}
            scales = {"decoder": 1, "encoder": self.vae_pixels}  # rows of its input for each row of latents
            if self.vae_side and (scale := scales.get(role_of(component))):
                side = self.vae_side * scale
                feeds = {name: middle(array, side) for name, array in feeds.items()}
            yield feeds

    def by_folder(self, component: str) -> tuple[Samples, ...]:
        """These samples cut into those of each folder that has any of `component`."""
        parts = [Samples((folder,), (digest,)) for folder, digest in zip(self.folders, self.digests, strict=True)]
        held = tuple(part for part in parts if next(part.folders[0].glob(f"{component}-*.npz"), None))
        self.files(component)  # raises where there are none at all
        return held

    def weight(self, feeds: Feeds) -> float:
        """What an error in the answer to `feeds` counts."""
        return dict(self.weights).get(float(feeds["timestep"]), 1.0) if "timestep" in feeds else 1.0


def middle(array: NDArray[Any], side: int) -> NDArray[Any]:
    """The middle `side` rows and columns of [1, C, H, W]; whole where it has no more."""
    top, left = (max(0, (length - side) // 2) for length in array.shape[2:])
    return np.ascontiguousarray(array[:, :, top : top + side, left : left + side])
