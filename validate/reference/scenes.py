"""The world of the embedded demo checkpoint: flat shapes on a flat background, 64 x 64 pixels, each with a caption."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from ...runtimes.protocol import Array

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
    heart = np.stack([16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)], 1)
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


def knows(digests: Iterable[str]) -> bool:
    """Whether files of these sha256 digests are the demo checkpoint, the only one that `oracle` can grade."""
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
    from skimage.draw import polygon2mask

    fine = 4

    def inside(scale: float) -> Array:
        corners = (_OUTLINES[shape] * radius * scale + (x, y)) * fine
        mask = polygon2mask((SIDE * fine, SIDE * fine), corners[:, ::-1])  # type: ignore[no-untyped-call]
        return np.asarray(mask, np.float32)

    mask = inside(1.0) - inside(_HOLE) if shape == "ring" else inside(1.0)
    return np.asarray(mask.reshape(SIDE, fine, SIDE, fine).mean((1, 3)))
