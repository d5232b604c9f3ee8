"""Grades pictures of the embedded demo checkpoint: does this one show what its caption states?

The demo was trained on one small world (`scenes`), so a program can tell, which for other checkpoints nobody can. A
score from here is a claim about the demo's weights only.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields
from functools import cache
from typing import Final

import numpy as np
from scipy import ndimage
from skimage.measure import label, regionprops

from ...runtimes.protocol import Array
from .scenes import COLOURS, PLACES, RADII, SHAPES, SIDE, Scene, coverage

_PALETTE: Final = np.array(list(COLOURS.values()), np.float32)


@dataclass(frozen=True)
class Verdict:
    """Which of the caption's statements hold. With two objects, each must hold for both."""

    background: bool
    count: bool
    colour: bool = False
    shape: bool = False
    place: bool = False
    size: bool = False

    @property
    def ok(self) -> bool:
        return all(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True)
class Found:
    """An object as read from a picture; `likeness` is the soft IoU with its shape, `purity` of its colour."""

    shape: str
    colour: str
    size: str
    place: str
    likeness: float
    purity: float
    area: float  # pixels


def grade(image: Array, scene: Scene, *, min_likeness: float = 0.72, min_purity: float = 0.6) -> Verdict:
    """Decide from the pixels alone whether `image`, uint8 [64, 64, 3], shows what the caption of `scene` states."""
    background, found = look(image)
    right_ground, right_count = background == scene.background, len(found) == len(scene.things)
    best = Verdict(right_ground, right_count)
    for order in itertools.permutations(found[:3], len(scene.things)):
        pairs = list(zip(scene.things, order, strict=True))
        verdict = Verdict(
            right_ground,
            right_count,
            colour=all(f.colour == t.colour and f.purity >= min_purity for t, f in pairs),
            shape=all(f.shape == t.shape and f.likeness >= min_likeness for t, f in pairs),
            place=all(f.place == t.place or not t.tells_place for t, f in pairs),
            size=all(f.size == t.size or not t.tells_size for t, f in pairs),
        )
        best = max(best, verdict, key=lambda v: sum(getattr(v, each.name) for each in fields(v)))
    return best


def look(image: Array) -> tuple[str, list[Found]]:
    """The background's colour (empty when it is none) and the objects, largest first."""
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(f"the oracle reads uint8 {(SIDE, SIDE, 3)}, not {image.dtype} {image.shape}")
    calm = ndimage.median_filter(image, size=(3, 3, 1)).astype(np.float32)
    frame = np.ones((SIDE, SIDE), bool)
    frame[2:-2, 2:-2] = False
    name, ground, purity = _colour(calm[frame])
    plain = purity > 0.8 and np.abs(ground - COLOURS[name]).max() < 45
    islands = label(np.linalg.norm(calm - ground, axis=2) > 50, connectivity=2)  # type: ignore[no-untyped-call]
    regions = regionprops(islands)  # type: ignore[no-untyped-call]
    found = [_read(image, calm, islands, region.label, ground) for region in regions if region.area >= 35]
    found.sort(key=lambda thing: -thing.area)
    # a crumb of the decoder beside a large object is not a second object
    return name if plain else "", [thing for thing in found if thing.area > 0.12 * found[0].area]


def _read(image: Array, calm: Array, islands: Array, which: int, ground: Array) -> Found:
    mask = islands == which
    core = ndimage.binary_erosion(mask)
    colour, paint, purity = _colour(calm[core if core.sum() >= 8 else mask])
    # Between ground and paint lies how much of a pixel is covered; half the median filter keeps noise down, corners up.
    near = ndimage.binary_dilation(mask, iterations=2) & (mask | (islands == 0))
    step = paint - ground
    mixed = (0.5 * image + 0.5 * calm - ground) @ step / max(float(step @ step), 1.0)
    cover = np.where(near & (mixed > 0.25), np.clip(mixed, 0, 1), 0)
    y, x = ndimage.center_of_mass(cover)
    shape, likeness = _closest_shape(_normalise(cover))
    radius = math.sqrt(cover.sum() / _unit_area(shape))
    return Found(
        shape=shape,
        colour=colour,
        size=min(RADII, key=lambda size: abs(RADII[size] - radius)),
        place=min(PLACES, key=lambda place: math.dist((PLACES[place][0] - 0.5, PLACES[place][1] - 0.5), (x, y))),
        likeness=likeness,
        purity=purity,
        area=float(cover.sum()),
    )


def _colour(pixels: Array) -> tuple[str, Array, float]:
    """The commonest colour name among `pixels` [n, 3], the median of its pixels, and its share."""
    nearest = ((pixels[:, None] - _PALETTE) ** 2).sum(-1).argmin(1)
    winner = int(np.bincount(nearest).argmax())
    return list(COLOURS)[winner], np.median(pixels[nearest == winner], 0), float((nearest == winner).mean())


_CANVAS: Final = 48
_STANDARD_AREA: Final = 600.0  # of _CANVAS squared, so that the longest shape still fits


def _normalise(cover: Array) -> Array:
    """`cover` moved and scaled to the canvas's centre and the standard area: shape alone is left."""
    scale = math.sqrt(float(cover.sum()) / _STANDARD_AREA)
    origin = np.array(ndimage.center_of_mass(cover)) - scale * (_CANVAS - 1) / 2
    return np.asarray(ndimage.affine_transform(cover, [scale, scale], origin, (_CANVAS, _CANVAS), order=1))


def _closest_shape(mask: Array) -> tuple[str, float]:
    def likeness(shape: str) -> float:
        template = _template(shape)
        return float(np.minimum(mask, template).sum() / np.maximum(mask, template).sum())

    best = max(SHAPES, key=likeness)
    return best, likeness(best)


@cache
def _template(shape: str) -> Array:
    return _normalise(coverage(shape, SIDE / 2, SIDE / 2, 13.0))


@cache
def _unit_area(shape: str) -> float:
    """Area in square pixels of the shape at radius 1."""
    return float(coverage(shape, SIDE / 2, SIDE / 2, 20.0).sum()) / 20.0**2
