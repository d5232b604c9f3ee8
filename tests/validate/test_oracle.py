"""The oracle accepts what is there, rejects what is not, and knows which checkpoint it may speak about."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.runtimes.protocol import Array
from diffusette.validate.reference.oracle import grade
from diffusette.validate.reference.scenes import COLOURS, PLACES, SHAPES, Scene, knows, oracle_prompts, render

SCENES = oracle_prompts(300, seed=5)


@pytest.fixture(scope="module")
def pictures() -> list[Array]:
    return [render(scene, seed) for seed, scene in enumerate(SCENES)]


def accepted(pictures: list[Array], scenes: tuple[Scene, ...]) -> float:
    return float(np.mean([grade(picture, scene).ok for picture, scene in zip(pictures, scenes, strict=True)]))


def one_attribute_changed(scene: Scene, chance: random.Random) -> Scene:
    """A scene that differs in one thing that the caption states."""
    thing, *rest = scene.things
    kinds = ["background", "colour", "shape", *(["place"] if thing.tells_place else [])]
    kind = chance.choice(kinds)
    others: Callable[[Collection[str], str], str] = lambda known, now: chance.choice([x for x in known if x != now])  # noqa: E731
    if kind == "background":
        return replace(scene, background=others(COLOURS, scene.background))
    if kind == "place" and rest:
        # swapping two alike things would change nothing
        if (thing.shape, thing.colour) == (rest[0].shape, rest[0].colour):
            return replace(scene, background=others(COLOURS, scene.background))
        swapped = (replace(thing, place=rest[0].place), replace(rest[0], place=thing.place))
        return replace(scene, things=swapped)
    known = {"colour": COLOURS, "shape": SHAPES, "place": PLACES}[kind]
    return replace(scene, things=(replace(thing, **{kind: others(known, getattr(thing, kind))}), *rest))


def test_truth_is_accepted(pictures: list[Array]) -> None:
    assert accepted(pictures, SCENES) >= 0.99


def test_one_changed_attribute_is_rejected(pictures: list[Array]) -> None:
    chance = random.Random(0)
    assert accepted(pictures, tuple(one_attribute_changed(scene, chance) for scene in SCENES)) <= 0.01


def test_captions_of_other_pictures_are_rejected(pictures: list[Array]) -> None:
    assert accepted(pictures, (*SCENES[1:], SCENES[0])) <= 0.01


def test_noise_of_one_tenth_of_the_range_is_tolerated(pictures: list[Array]) -> None:
    noise = np.random.default_rng(0)
    noisy = [np.clip(p + noise.normal(0, 24, p.shape), 0, 255).astype(np.uint8) for p in pictures]
    assert accepted(noisy, SCENES) >= 0.99


@pytest.mark.parametrize("picture", [np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 128, np.uint8)])
def test_an_empty_picture_shows_nothing(picture: Array) -> None:
    assert not any(grade(picture, scene).ok for scene in SCENES[:20])


def test_a_picture_of_noise_shows_nothing() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert not any(grade(noise, scene).ok for scene in SCENES[:20])


def test_only_eight_bit_pictures_of_its_size_are_read() -> None:
    with pytest.raises(ValueError, match="uint8"):
        grade(np.zeros((64, 64, 3), np.float32), SCENES[0])


def test_captions_are_reproducible_and_tell_the_scene() -> None:
    assert oracle_prompts(8, seed=3) == oracle_prompts(8, seed=3) != oracle_prompts(8, seed=4)
    for scene in SCENES:
        for thing in scene.things:
            assert thing.shape in scene.caption
            assert thing.colour in scene.caption
        assert scene.background in scene.caption


def test_the_oracle_knows_the_embedded_checkpoint_and_no_other() -> None:
    assert knows(open_checkpoint("demo").sources.values())
    assert not knows(["0" * 64])
