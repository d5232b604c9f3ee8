"""The race against float32: fair turns, ratios of neighbours, and what the processor has for integers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusette.validate.speed import race as speed
from diffusette.validate.speed import times
from diffusette.validate.speed.race import SLOWER, Speed, int8_unit, median_interval, take_turns, whole_ratio

from .test_latency import FEEDS, Clocked


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SETTLE", 0.0)


class Disturbed(Clocked):
    """Waits for a processor in every turn of which `seconds` is at least 0.01."""

    def run(self, feeds: Any) -> Any:
        found = super().run(feeds)
        self.last_waited = self.last_seconds / 2 if self.last_seconds >= 0.01 else 0.0
        return found


def raced(ours: list[float], theirs: list[float]) -> tuple[tuple[list[float], list[float]], list[str]]:
    diary: list[str] = []
    racers: list[Any] = [(Clocked("a", ours, diary), FEEDS), (Clocked("b", theirs, diary), FEEDS)]
    *seconds, calm = take_turns(racers)
    assert calm
    return (seconds[0], seconds[1]), diary


def test_the_first_round_does_not_count_and_places_change() -> None:
    (ours, theirs), diary = raced([9, *[0.001] * 40], [9, *[0.002] * 40])
    assert len(ours) == len(theirs) == speed.CLEAR_TURNS
    assert set(ours) == {0.001}
    assert set(theirs) == {0.002}
    assert "".join(diary).startswith("baabba")


def test_slow_models_take_few_turns() -> None:
    (ours, _), _ = raced([20.0] * 40, [10.0] * 40)
    assert len(ours) == speed.LEAST_TURNS


def test_an_open_race_goes_on() -> None:
    (ours, _), _ = raced([0.001, *[0.0009, 0.0015] * 40], [0.001] * 81)
    assert len(ours) == speed.MOST_TURNS


def test_turns_in_which_other_work_took_the_processor_do_not_count() -> None:
    racers: list[Any] = [
        (Disturbed("a", [9, *[0.002, 0.09, 0.05] * 20], []), FEEDS),
        (Disturbed("b", [9, *[0.002] * 60], []), FEEDS),
    ]
    ours, theirs, calm = take_turns(racers)
    assert calm
    assert set(ours) == set(theirs) == {0.002}
    assert len(ours) == speed.CLEAR_TURNS


def test_where_no_turn_is_calm_all_count_and_it_is_said() -> None:
    racers: list[Any] = [(Disturbed(name, [9, *[0.02] * 60], []), FEEDS) for name in "ab"]
    ours, theirs, calm = take_turns(racers)
    assert not calm
    assert len(ours) == len(theirs) == speed.MOST_TURNS


def test_the_interval_of_a_median_needs_no_model_of_the_noise() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval([float(n) for n in range(1, 16)]) == (4.0, 12.0)  # tables: ranks 4 and 12 of 15


def measured(ours: float, theirs: float, low: float = 1.0) -> Speed:
    return Speed(Path(), "x", ours, theirs, ours / theirs, (low, 9.0), 5)


def test_a_picture_weighs_each_component_by_its_calls() -> None:
    speeds = {"unet": measured(10, 20), "vae_decoder": measured(100, 50), "vae_encoder": measured(1e6, 1)}
    assert whole_ratio(speeds, {"unet": 40, "vae_decoder": 1, "text_encoder": 2}) == pytest.approx(500 / 850)


def test_only_a_clear_loss_is_called_slower() -> None:
    def least(speed: Speed) -> float:
        return whole_ratio({"unet": speed}, {"unet": 40}, least=True)

    assert least(measured(1.2, 1.0, low=0.95)) < SLOWER < least(measured(1.3, 1.0, low=1.15))


@pytest.mark.parametrize(
    ("line", "unit"),
    [
        ("flags\t\t: fpu avx2 f16c", ""),
        ("flags\t\t: fpu avx2 avx_vnni", "AVX-VNNI"),
        ("Features\t: fp asimd asimddp", "dot product (ARMv8.2)"),
        ("model name\t: unknown", None),
    ],
)
def test_the_processor_says_what_it_has_for_integers(line: str, unit: str | None, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert int8_unit(tmp_path / "cpuinfo") == unit
    assert int8_unit(tmp_path / "none") is None


@pytest.mark.parametrize("alone", [True, False])
def test_where_two_threads_are_disturbed_one_is_raced(
    alone: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[int] = []

    def open_session(_: str, model: Any, *, threads: int, timed: bool) -> Any:
        opened.append(threads)
        return Disturbed("a", [9, *[0.02 if threads == 2 or not alone else 0.002] * 60], [])

    monkeypatch.setattr(speed, "native_feeds", lambda *_: FEEDS)
    monkeypatch.setattr(speed, "open_isolated", open_session)
    probes: Any = SimpleNamespace(read=lambda _: iter([SimpleNamespace(feeds=FEEDS)]))
    model: Any = SimpleNamespace(component="unet", forms={})
    raced = speed.MeasureSpeed(model, model, probes, {}, "1", "here", 2).run(tmp_path)
    assert opened == [2, 2, 1, 1]
    assert (raced.threads, raced.calm, raced.ratio) == (1, alone, 1.0)


def test_models_of_a_menu_are_timed_in_calm_rounds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spans = {"a": [9, *[0.002, 0.09] * 5], "b": [9, *[0.05] * 4, 0.04, *[0.06] * 5]}
    monkeypatch.setattr(times, "SETTLE", 0.0)
    monkeypatch.setattr(times, "native_feeds", lambda *_: FEEDS)
    monkeypatch.setattr(times, "open_isolated", lambda _, model, **__: Disturbed(model, spans[model], []))
    probes: Any = SimpleNamespace(read=lambda _: iter([SimpleNamespace(feeds=FEEDS)]))

    class Model(str):
        component = "unet"

    models: Any = (Model("a"), Model("b"))
    found = times.MeasureTimes(models, probes, {}, "1", "here", 2).run(tmp_path)
    assert found.ms == pytest.approx((2.0, 40.0))  # `b` had to wait in every round
