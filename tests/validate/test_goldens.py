"""Golden vectors: a replay that is the same passes, and each mistake of a port is named by the part it is in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from diffusette.export.checkpoint import DEMO_FOLDER
from diffusette.pipeline.errors import BundleError
from diffusette.runtimes.txt2img.generate import Drawing
from diffusette.runtimes.txt2img.tokenizer import PromptTokenizer
from diffusette.validate.golden_checks import check_goldens, facts_of
from diffusette.validate.goldens import (
    MOST_VALUES,
    Encoding,
    Goldens,
    Sample,
    read_goldens,
    write_goldens,
)

TIMESTEPS = (901.0, 501.0, 101.0)


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(DEMO_FOLDER / "tokenizer", 77, 680)


def a_drawing() -> Drawing:
    rng = np.random.default_rng(0)
    trajectory = tuple(rng.standard_normal((1, 4, 16, 16)).astype(np.float32) for _ in TIMESTEPS)
    image = rng.uniform(size=(64, 64, 3)).astype(np.float32)
    return Drawing(image, trajectory[-1], trajectory, "a star", "", 7, 3, "ddim", 4.0, ())


@pytest.fixture
def goldens(tokenizer: PromptTokenizer) -> Goldens:
    return write_goldens((tokenizer, None), a_drawing(), TIMESTEPS, "mnn 3.6.1")


def failures(goldens: Goldens, tokenizer: PromptTokenizer, drawing: Drawing) -> list[str]:
    return [check.what for check in check_goldens(goldens, (tokenizer, None), drawing) if not check.ok]


def test_an_equal_replay_is_found_equal_also_after_reading(goldens: Goldens, tokenizer: PromptTokenizer) -> None:
    again = read_goldens(goldens.to_json().encode(), "goldens.json")
    assert again == goldens
    checks = list(check_goldens(again, (tokenizer, None), a_drawing()))
    facts = facts_of(checks, again)
    assert (facts["ok"], facts["first_bad"], facts["made_by"]) == (True, None, "mnn 3.6.1")
    assert [check["found"] for check in facts["checks"]] == [0, 0, 999.0, 999.0, 999.0, 0]
    assert "last bit" in checks[-1].note


def test_a_sample_is_small_and_tells_the_whole_tensors_moments() -> None:
    tensor = np.arange(1000, dtype=np.float32).reshape(10, 100)
    sample = Sample.of(tensor)
    assert (sample.shape, sample.stride, len(sample.values)) == ((10, 100), 4, 250)
    assert sample.values[:3] == (0.0, 4.0, 8.0)
    assert sample.mean == pytest.approx(499.5)
    assert len(Sample.of(np.zeros(257)).values) <= MOST_VALUES
    tenth = Sample.of(np.array([0.1], np.float32)).values[0]
    assert (tenth, np.float32(tenth)) == (0.1, np.float32(0.1)), "short decimals that are the same float32"


def an_encoding(seed: int = 1) -> Encoding:
    rng = np.random.default_rng(seed)
    encoded, start = (rng.standard_normal((1, channels, 16, 16)).astype(np.float32) for channels in (8, 4))
    return Encoding(0.5, encoded, start)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda encoding: encoding, None),
        (lambda encoding: replace(encoding, encoded=encoding.encoded * np.float32(1.001)), "picture encoded"),
        (lambda encoding: replace(encoding, start=encoding.start * np.float32(1.001)), "start at strength 0.5"),
    ],
)
def test_the_encoding_of_a_picture_is_checked_before_the_steps(
    tokenizer: PromptTokenizer, change: Callable[[Encoding], Encoding], named: str | None
) -> None:
    goldens = write_goldens((tokenizer, None), a_drawing(), TIMESTEPS, "mnn 3.6.1", an_encoding())
    again = read_goldens(goldens.to_json().encode(), "goldens.json")
    checks = list(check_goldens(again, (tokenizer, None), a_drawing(), change(an_encoding())))
    assert [check.what for check in checks][2:4] == ["picture encoded", "start at strength 0.5"]
    assert facts_of(checks, again)["first_bad"] == named


Change = Callable[[Drawing], Drawing]


def at_step(index: int, change: Callable[[Any], Any]) -> Change:
    def changed(drawing: Drawing) -> Drawing:
        return replace(
            drawing, trajectory=tuple(change(x) if i == index else x for i, x in enumerate(drawing.trajectory))
        )

    return changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (at_step(1, lambda x: x * np.float32(1.001)), ["latents after step 2 (t = 501)"]),
        (at_step(0, lambda x: x.astype(np.float16).astype(np.float32)), ["latents after step 1 (t = 901)"]),
        (lambda d: replace(d, image=d.image + np.float32(0.2 / 255)), ["picture"]),
        (lambda d: replace(d, trajectory=d.trajectory[:2]), ["steps"]),
    ],
)
def test_what_is_off_is_named(goldens: Goldens, tokenizer: PromptTokenizer, change: Change, said: list[str]) -> None:
    assert failures(goldens, tokenizer, change(a_drawing())) == said


def test_another_processors_last_bits_pass(goldens: Goldens, tokenizer: PromptTokenizer) -> None:
    near = replace(a_drawing(), image=a_drawing().image + np.float32(0.02 / 255))
    near = at_step(2, lambda x: x * np.float32(1 + 1e-6))(near)
    checks = list(check_goldens(goldens, (tokenizer, None), near))
    assert all(check.ok for check in checks)
    assert "not bit for bit" in checks[-1].note


def test_wrong_padding_is_found_in_the_ids(goldens: Goldens) -> None:
    padded = PromptTokenizer(DEMO_FOLDER / "tokenizer", 77, 0)
    first = next(check_goldens(goldens, (padded, None), a_drawing()))
    assert (first.what, first.ok, first.found) == ("token ids", False, 9)  # all but the one that fills the context


def cut_values(data: Any) -> None:
    data["picture"]["noise"]["values"].pop()


def misspell(data: Any) -> None:
    data["picture"]["callz"] = data["picture"].pop("calls")


def newer(data: Any) -> None:
    data["schema"] = 2


@pytest.mark.parametrize(("damage", "said"), [(cut_values, "no sample of"), (misspell, "callz"), (newer, "schema")])
def test_damaged_goldens_are_refused(goldens: Goldens, damage: Callable[[Any], None], said: str) -> None:
    data = json.loads(goldens.to_json())
    damage(data)
    with pytest.raises(BundleError, match=said):
        read_goldens(json.dumps(data).encode(), "goldens.json")
    with pytest.raises(BundleError, match="no goldens"):
        read_goldens(b"{", "goldens.json")


def test_goldens_of_another_size_are_refused(goldens: Goldens, tokenizer: PromptTokenizer) -> None:
    with pytest.raises(BundleError, match="the bundle draws"):
        list(check_goldens(goldens, (tokenizer, None), replace(a_drawing(), image=np.zeros((32, 32, 3), np.float32))))


def test_the_second_encoders_ids_are_held_too(tokenizer: PromptTokenizer) -> None:
    padded = PromptTokenizer(DEMO_FOLDER / "tokenizer", 77, 0)
    goldens = write_goldens((tokenizer, padded), a_drawing(), TIMESTEPS, "ort 1.32.0")
    assert next(check_goldens(goldens, (tokenizer, padded), a_drawing())).ok
    assert not next(check_goldens(goldens, (tokenizer, tokenizer), a_drawing())).ok
    assert not next(check_goldens(goldens, (tokenizer, None), a_drawing())).ok
