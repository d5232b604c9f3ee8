"""`validate --image`: how pictures drift along the schedule, with the same noise on both sides."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Command

pytestmark = pytest.mark.slow


def test_a_stochastic_scheduler_gets_the_same_noise_on_both_sides(command: Command, converted: Path) -> None:
    words = ("--image", "--scheduler", "euler_a", "--steps", 10, "--seeds", 2, "--json")
    answer = command("validate", converted / "ncnn", *words)
    assert answer.code == 0, answer.err
    image = answer.json["image"]
    assert (image["scheduler"], image["steps"]) == ("euler_a", 10)
    pictures = image["pictures"]
    assert len({(picture["prompt"], picture["seed"]) for picture in pictures}) == len(pictures) == 8
    assert len({picture["prompt"] for picture in pictures}) == 4
    assert len(image["drift_db"]) == 10
    curve = answer.json["timesteps"]
    assert (curve["scheduler"], curve["steps"], curve["problem"]) == ("euler_a", 10, None)
    assert [len(point["calls_db"]) for point in curve["points"]] == [8] * 10  # four prompts, both branches
    assert min(point["same_weights_db"] for point in curve["points"]) > 95
    assert curve["activations"] is None
    assert min(image["drift_db"]) > 50  # other noise at any step would leave less than 20 dB
    for picture in pictures:
        assert picture["drift_db"][-1] == picture["latents_snr_db"]
        assert sum(picture["histogram"]["counts"]) == 64 * 64 * 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--image", "--scheduler", "eluer"), "eluer"),
        (("--image", "--steps", 11), "no schedule for ddim at 11 steps"),
        (("--no-image", "--seeds", 2), "add --image"),
    ],
)
def test_pictures_that_cannot_be_drawn_are_refused_before_any_work(
    command: Command, converted: Path, words: tuple[object, ...], said: str
) -> None:
    answer = command("validate", converted / "mnn", *words)
    assert answer.code == 2
    assert said in answer.err
    assert "components" not in answer.err
