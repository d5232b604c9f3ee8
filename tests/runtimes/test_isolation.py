"""A session in a child process: checked on both sides, and a crash is our error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from diffusette.runtimes.isolation import IsolatedSession, open_isolated
from diffusette.stages.errors import FeedError, ModelError, NoRoom, ToolCrashed

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(autouse=True)
def children_find_unruly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)


def opened(how: str) -> IsolatedSession:
    return open_isolated("unruly:open_doubler", {"how": how}, threads=1, name="doubler")


def test_it_runs_and_measures() -> None:
    with opened("well") as session:
        assert (session.run({"x": X})["y"] == 2 * X).all()
        assert session.load_seconds > 0
        assert 0 < session.last_seconds < 5
        assert 0 <= session.last_waited < 5
        assert session.peak_rss_mib > 10
        assert session.inputs[0].name == "x"


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({}, "takes x; it was given nothing"),
        ({"x": X, "z": X}, "it was given x, z"),
        ({"x": X.astype(np.float64)}, r"x is float64\[2, 3\], it takes float32"),
        ({"x": X[0]}, r"x is float32\[3\]"),
        ({"x": np.where(X == 1, np.nan, X).astype(np.float32)}, "holds 1 NaN or infinite of 6"),
        ({"x": np.where(X == 1, np.inf, X).astype(np.float32)}, "holds 1 NaN or infinite of 6"),
    ],
)
def test_wrong_feeds_never_reach_the_child(feeds: dict[str, Any], words: str) -> None:
    with opened("crash") as session, pytest.raises(FeedError, match=words):
        session.run(feeds)


def test_a_fortran_ordered_array_arrives_in_order() -> None:
    with opened("well") as session:
        assert (session.run({"x": np.asfortranarray(X)})["y"] == 2 * X).all()


def test_a_crash_in_a_run_names_model_and_signal() -> None:
    with (
        opened("crash") as session,
        pytest.raises(ToolCrashed, match=r"(?s)doubler crashed with SIGSEGV.*about to fall"),
    ):
        session.run({"x": X})


def test_a_crash_while_loading_is_told() -> None:
    with pytest.raises(ToolCrashed, match="doubler crashed with SIGABRT"):
        opened("crash on load")


def test_an_error_of_the_session_arrives_as_it_was_raised() -> None:
    with opened("refuse") as session, pytest.raises(ModelError, match="no") as caught:
        session.run({"x": X})
    assert caught.value.hint == "ask again"


def test_memory_that_is_refused_is_no_room_and_no_bug() -> None:
    with opened("greedy") as session, pytest.raises(NoRoom, match=r"running the model ran out of memory: Unable"):
        session.run({"x": X})
    with pytest.raises(NoRoom, match=r"loading the model ran out of memory$"):
        opened("greedy on load")


@pytest.mark.parametrize(
    ("how", "words"), [("broken weights", "reaches 3.4e"), ("other shape", r"float32\[3, 2\], not")]
)
def test_results_that_no_model_gives_are_refused(how: str, words: str) -> None:
    with opened(how) as session, pytest.raises(ToolCrashed, match=words):
        session.run({"x": X})


def test_closing_ends_the_child() -> None:
    others = psutil.Process().children()
    session = opened("well")
    children = [child for child in psutil.Process().children() if child not in others]
    assert children
    session.close()
    session.close()
    assert not [child for child in children if child.is_running()]
