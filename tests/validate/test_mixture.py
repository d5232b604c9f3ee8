"""What a mixture of schemes costs pictures, as a search weighs it."""

from __future__ import annotations

import pytest
from diffusette.convert.search.mixture import picture_error


def test_the_error_of_pictures_is_the_mean_of_their_amplitudes() -> None:
    assert picture_error([40.0] * 4) == pytest.approx(1e-4)
    assert picture_error([40.0, 34.0]) == pytest.approx(((1e-2 + 10**-1.7) / 2) ** 2)


def test_a_picture_that_flipped_to_another_one_does_not_outweigh_all_others() -> None:
    """The demo's third calibration picture does at 6 bits (14 dB, the others 40), and a search then starved the text
    encoder for the UNet that was rounded when it flipped: 34 dB in the median instead of 37."""
    assert picture_error([43.7, 38.5, 14.5, 47.1]) == pytest.approx(picture_error([43.7, 38.5, 47.1]))
    assert picture_error([30.0, 25.0, 20.0, 28.0]) > picture_error([30.0, 25.0, 28.0]), "a bad one is no other one"
