"""The world of the embedded demo checkpoint, and a grader that reads its pictures.

The demo was trained on one thing: flat shapes on a flat background, 64 x 64 pixels, with a caption. So a program can
say whether a picture shows what its caption states, which for other checkpoints nobody can. A score from here is a
claim about the demo's weights only.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from typing import Final

import numpy as np
from scipy import ndimage
from skimage.draw import polygon2mask
from skimage.measure import label, regionprops

from ..runtimes.protocol import Array

DEMO_UNET: Final = "2f61cc277bebd99ba73440fbf75992b63a85e71bb1b43b4e76470c230692fc09"
"""sha256 of the demo's UNet weights: the file that makes this world the right one."""

SIDE: Final = 64  # pixels
COLOURS: Final = {
    "red": (220, 40, 40),
    "orange": (245, 145, 30),
    "yellow": (250, 228, 60),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "purple": (140, 50, 170),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
PLACES: Final = {"center": (32, 32), "left": (18, 32), "right": (46, 32), "top": (32, 18), "bottom": (32, 46)}  # x, y
RADII: Final = {"small": 10.0, "large": 16.0}  # pixels

_PALETTE: Final = np.array(list(COLOURS.values()), np.float32)
_SIZE_WORDS: Final = {"small": ("small", "tiny"), "large": ("large", "big")}
_PLACE_WORDS: Final = {
    "center": ("in the center", "in the middle"),
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}
_ONE: Final = ("{0}, on {1} background", "{0} on {2}", "{0}, {2} background", "a picture of {0}, on {1} background")
_TWO: Final = ("{0}, on {1} background", "{0} on {2}", "{0}, {2} background")


def _outlines() -> dict[str, Array]:
    """Corners (x, y) of each shape at radius 1, y pointing down."""

    def turn(count: int) -> Array:
        return 2 * np.pi * np.arange(count) / count - np.pi / 2  # the first corner points up

    def polar(radius: Array | float, angle: Array) -> Array:
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)

    arm, reach = 0.34, 1.02
    plus = [(-arm, -reach), (arm, -reach), (arm, -arm), (reach, -arm), (reach, arm), (arm, arm)]
    t = turn(60)
    heart = np.stack(
        [16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)], 1
    )
    return {
        "circle": polar(1.0, turn(64)),
        "square": np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]),
        "triangle": polar(1.15, turn(3)),
        "star": polar(np.tile([1.15, 0.5], 5), turn(10)),
        "ring": polar(1.0, turn(64)),
        "cross": np.array([*plus, *((-x, -y) for x, y in plus)]),
        "diamond": np.array([(0, -1.15), (0.95, 0), (0, 1.15), (-0.95, 0)]),
        "heart": heart * (1 / 15.5, -1 / 15.5) - (0, 0.04),
    }


_OUTLINES: Final = _outlines()
_HOLE: Final = 0.55  # inner radius of a ring
SHAPES: Final = tuple(_OUTLINES)


@dataclass(frozen=True)
class Thing:
    """One object; `tells_*` say whether the caption states that attribute."""

    shape: str
    colour: str
    size: str
    place: str
    tells_size: bool = True
    tells_place: bool = True


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]
    caption: str = ""


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


def knows(digests: Iterable[str]) -> bool:
    """Whether files of these sha256 digests are the demo checkpoint, the only one that can be graded here."""
    return DEMO_UNET in digests


def oracle_prompts(count: int, seed: int) -> tuple[Scene, ...]:
    """Scenes with captions from the distribution that the demo was trained on, a quarter with two objects."""
    chance = random.Random(seed)
    return tuple(_scene(chance) for _ in range(count))


def _scene(chance: random.Random) -> Scene:
    background = chance.choice(list(COLOURS))
    colours = [colour for colour in COLOURS if colour != background]
    if chance.random() < 0.25:
        places = list(chance.choice((("left", "right"), ("top", "bottom"))))
        chance.shuffle(places)
        tells = chance.random() < 0.8
        things = tuple(
            Thing(chance.choice(SHAPES), chance.choice(colours), "small", place, False, tells) for place in places
        )
    else:
        shape, colour = chance.choice(SHAPES), chance.choice(colours)
        size, place = chance.choice(list(RADII)), chance.choice(list(PLACES))
        things = (Thing(shape, colour, size, place, chance.random() < 0.8, chance.random() < 0.85),)
    template = chance.choice(_ONE if len(things) == 1 else _TWO)
    phrases = " and ".join(_phrase(thing, chance) for thing in things)
    return Scene(background, things, template.format(phrases, _article(background), background))


def _phrase(thing: Thing, chance: random.Random) -> str:
    words = [thing.colour, thing.shape]
    if thing.tells_size:
        words.insert(0, chance.choice(_SIZE_WORDS[thing.size]))
    if thing.tells_place:
        words.append(chance.choice(_PLACE_WORDS[thing.place]))
    return _article(" ".join(words))


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase.startswith("orange") else f"a {phrase}"


def render(scene: Scene, seed: int) -> Array:
    """Draw `scene` as uint8 [64, 64, 3] with the world's small variations of colour, place and size."""
    chance = random.Random(seed)

    def tint(colour: str) -> Array:
        return np.clip([channel + chance.uniform(-6, 6) for channel in COLOURS[colour]], 0, 255)

    image = np.broadcast_to(tint(scene.background), (SIDE, SIDE, 3))
    for thing in scene.things:
        x, y = (value + chance.uniform(-1, 1) for value in PLACES[thing.place])
        radius = RADII[thing.size] * (1 + chance.uniform(-0.06, 0.06))
        mask = coverage(thing.shape, x, y, radius)[..., None]
        image = image * (1 - mask) + tint(thing.colour) * mask
    return np.asarray(np.clip(image + 0.5, 0, 255).astype(np.uint8))


def coverage(shape: str, x: float, y: float, radius: float) -> Array:
    """How much of each pixel the shape covers, 0..1, [64, 64]; each pixel is sampled at 4 x 4 points."""
    fine = 4

    def inside(scale: float) -> Array:
        corners = (_OUTLINES[shape] * radius * scale + (x, y)) * fine
        return np.asarray(polygon2mask((SIDE * fine, SIDE * fine), corners[:, ::-1]), np.float32)

    mask = inside(1.0) - inside(_HOLE) if shape == "ring" else inside(1.0)
    return np.asarray(mask.reshape(SIDE, fine, SIDE, fine).mean((1, 3)))


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
    islands = label(np.linalg.norm(calm - ground, axis=2) > 50, connectivity=2)
    found = [_read(image, calm, islands, region.label, ground) for region in regionprops(islands) if region.area >= 35]
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
