"""`auto`: the smallest that passes and does not lose time; what it chose is what the recipe then says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.convert import auto
from diffusette.convert.auto import candidates, choose
from diffusette.convert.build import TargetBuild
from diffusette.convert.recipe import load_recipe, merged, parameters_of, parse_recipe
from diffusette.runtimes.ort.target import OrtTarget
from diffusette.validate.report import ParityReport
from diffusette.validate.speed.race import Speed

PARAMETERS: Any = {
    "text_encoder": {"fc.weight": (64, 64)},
    "unet": {"conv_in.weight": (64, 64, 3, 3)},
    "vae_decoder": {"conv_in.weight": (8, 64, 3, 3)},
}


class Told(TargetBuild):
    """Builds nothing; is told ratios and verdicts by precision."""

    ratios: Mapping[str, float]
    failing: tuple[str, ...]
    seen: tuple[str, ...]  # precisions whose pictures pass their gates, but not unseen

    def ask(self) -> Any:
        return None

    def models(self, plans: Any, recipe: Any, probes: Any) -> Any:
        return plans, {part: type("Model", (), {"precision": plan.label})() for part, plan in plans.items()}

    def race(self, models: Any, probes: Any) -> Any:
        return {
            part: {
                "": Speed(
                    Path(),
                    part,
                    10 * self.ratios[model.precision],
                    10,
                    self.ratios[model.precision],
                    (self.ratios[model.precision],) * 2,
                    5,
                )
            }
            for part, model in models.items()
        }

    def prove(self, models: Any, plans: Any, probes: Any) -> ParityReport:
        ok = models["unet"].precision not in self.failing

        class Verdict:
            def failures(self) -> list[str]:
                return ["unet: far off"]

        verdict: Any = Verdict()
        verdict.ok = ok
        verdict.image = SimpleNamespace(psnr_db=35.0 if models["unet"].precision in self.seen else 50.0)
        return verdict


class Listener:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    ratios: dict[str, float],
    failing: tuple[str, ...] = (),
    seen: tuple[str, ...] = (),
) -> tuple[str, str]:
    monkeypatch.setattr(auto, "calibrated", lambda plans, *_: plans)
    listener: Any = Listener()
    recipe = merged(load_recipe("sd1-fp16"), precision="auto")
    job: Any = SimpleNamespace(recipe=recipe, parameters=PARAMETERS, checkpoint=None, pixels=(64, 64))
    nothing: Any = None
    work = Told(job, nothing, OrtTarget(), nothing, listener)
    object.__setattr__(work, "ratios", {"w8c_afp": 1.0, "fp16": 1.0, "fp32": 1.0} | ratios)
    object.__setattr__(work, "failing", failing)
    object.__setattr__(work, "seen", seen)
    built = choose(work)
    return built.recipe.quantize.precision, "\n".join(listener.said)


def test_the_smallest_that_passes_and_is_not_slower_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    precision, said = chosen(monkeypatch, {})
    assert precision == "w8c_afp"
    assert "ort w8c_afp is chosen" in said


def test_one_that_loses_time_is_never_taken_and_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    precision, said = chosen(monkeypatch, {"w8c_afp": 1.5})
    assert precision == "fp16"
    assert "ort w8c_afp is slower than fp32 here: a picture takes 1.50x" in said


def test_one_that_fails_its_gates_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    precision, said = chosen(monkeypatch, {}, ("w8c_afp",))
    assert precision == "fp16"
    assert "does not pass its gates: unet: far off" in said


def test_one_whose_pictures_may_be_seen_to_differ_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    precision, said = chosen(monkeypatch, {}, seen=("w8c_afp",))
    assert precision == "fp16"
    assert (
        "ort w8c_afp passes its gates, but its error may be visible: 35.0 dB in the worst picture, 40 are required"
        in said
    )


def test_float32_is_what_is_left_and_its_verdict_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    precision, _ = chosen(monkeypatch, {"w8c_afp": 2.0, "fp16": 2.0}, ("fp32",))
    assert precision == "fp32"


def test_schemes_whose_pictures_may_differ_visibly_are_not_tried() -> None:
    tried = [recipe.quantize.precision for recipe, _ in candidates(OrtTarget(), load_recipe("sd1-fp16"), PARAMETERS)]
    assert tried[0] == "w8c_afp"
    assert tried[-2:] == ["fp16", "fp32"]
    assert not any(name.startswith("w4") for name in tried)


def test_rules_stay_and_the_recipe_that_is_written_down_gives_the_same_plans() -> None:
    text = "schema = 1\n[quantize]\nprecision = 'auto'\n[[quantize.rules]]\nmatch = 'unet/conv_in'\nscheme = 'keep'\n"
    parameters = parameters_of(open_checkpoint("demo", survey=False))
    settled = parse_recipe(text, "mine.toml").settled("w8c_afp")
    plans = settled.plans(parameters)
    assert plans["unet"].label == "w8c_afp+keep"
    assert settled.to_toml().startswith("# mine.toml, for which precision auto chose w8c_afp\n")
    assert parse_recipe(settled.to_toml(), "mine.toml").plans(parameters) == plans
