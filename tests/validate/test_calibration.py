"""What models are calibrated with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusette.checkpoints.checkpoint import DEMO_FOLDER, open_checkpoint
from diffusette.checkpoints.single_file.tokenizer import CLIP
from diffusette.convert.recipe import parse_recipe
from diffusette.stages.artifacts import Checkpoint
from diffusette.stages.errors import RecipeError, UsageError
from diffusette.validate.reference.calibration import (
    calibration_plans,
    can_be_tuned,
    step_weights,
    tuning_plans,
)
from diffusette.validate.reference.probes import plan_for
from diffusette.validate.reference.prompts import GENERAL, calibration_prompts, prompts_for
from diffusette.validate.reference.scenes import oracle_prompts


def words(text: str) -> list[str]:
    return text.replace(",", "").split()


def test_no_prompt_of_a_gate_is_calibrated_with(demo_checkpoint: Checkpoint) -> None:
    plans = calibration_plans(demo_checkpoint, (64, 64))
    gate = plan_for(demo_checkpoint, (64, 64))
    used = {(prompt, plan.seed + i) for plan in plans for i, prompt in enumerate(plan.prompts)}
    assert len(used) == 24
    assert not {prompt for prompt, _ in used} & set(gate.prompts)
    assert not {seed for _, seed in used} & set(range(gate.seed, gate.seed + len(gate.prompts)))
    texts = {text for plan in plans for text in plan.texts}
    assert not texts & {*gate.prompts, *(scene.caption for scene in oracle_prompts(64, seed=0))}


def test_text_encoders_read_every_word_of_the_demos_world(demo_checkpoint: Checkpoint) -> None:
    """A word that no calibration prompt has is rounded blindly: twelve captions lack four of the oracle's words."""
    plans = calibration_plans(demo_checkpoint, (64, 64))
    read = {word for plan in plans for text in (*plan.prompts, *plan.texts) for word in words(text)}
    assert {word for scene in oracle_prompts(300, seed=3) for word in words(scene.caption)} <= read
    assert all(not plan.texts for plan in calibration_plans(demo_checkpoint, (64, 64), ("a user's own",)))
    assert calibration_plans(demo_checkpoint, (2048, 2048))[0].texts, "a large model's text encoder is quick"


def test_samples_span_the_schedule_and_both_branches(demo_checkpoint: Checkpoint) -> None:
    for plans in (calibration_plans(demo_checkpoint, (64, 64)), calibration_plans(demo_checkpoint, (64, 64), ("one",))):
        assert {step for plan in plans for step, _ in plan.picked} == {*range(0, 20, 3), 19}
        assert all({branch for _, branch in plan.picked} == {"conditional", "unconditional"} for plan in plans)


def test_a_distilled_model_is_calibrated_as_it_is_used(kind_folder: Callable[[str], Path]) -> None:
    """An LCM takes guidance as an input and has no second branch: without it, PyTorch could not even be asked."""
    plans = calibration_plans(open_checkpoint(kind_folder("lcm")), (64, 64))
    assert {plan.guidance_mode for plan in plans} == {"embedded"}
    assert all(plan.picked == tuple((step, "conditional") for step in range(plan.steps)) for plan in plans)
    assert all(plan.steps < 20 for plan in plans)


def test_a_large_model_gets_a_stage_a_prompt_and_few_calls(demo_checkpoint: Checkpoint) -> None:
    plans = calibration_plans(demo_checkpoint, (2048, 2048))
    assert all(len(plan.prompts) == 1 and len(plan.picked) == 4 for plan in plans)


def test_bundled_prompts_are_distinct_sentences() -> None:
    prompts = calibration_prompts(CLIP, 32)
    assert len(set(prompts)) == 32
    assert all(len(prompt) > 10 and prompt == prompt.strip() for prompt in prompts)


def test_a_model_is_asked_in_words_that_its_tokenizer_has_whole(tmp_path: Path) -> None:
    """Prompts that are spelt out to a model leave even a faultless conversion of it below the gate of its pictures."""
    captions = tuple(scene.caption for scene in oracle_prompts(4, seed=0))
    assert prompts_for(DEMO_FOLDER / "tokenizer", 4) == captions
    assert prompts_for(CLIP, 4) == GENERAL[:4]
    shutil.copy(DEMO_FOLDER / "tokenizer" / "tokenizer.json", tmp_path)  # as a bundle and a fine-tune may have it
    assert prompts_for(tmp_path, 4) == captions
    assert calibration_prompts(tmp_path, 4) == calibration_prompts(DEMO_FOLDER / "tokenizer", 4)


@pytest.mark.parametrize("vocabulary", ['{"r": 0, "red</w>": 1}', "[]", "{", '{"model": 3}', '{"red</w>": 49407}'])
def test_a_tokenizer_that_knows_neither_world_or_is_none_is_asked_neutrally(tmp_path: Path, vocabulary: str) -> None:
    for name in ("vocab.json", "tokenizer.json"):
        (tmp_path / name).write_text(vocabulary)
    assert prompts_for(tmp_path, 2) == GENERAL[:2]


def test_refuses_an_empty_list_of_prompts(demo_checkpoint: Checkpoint) -> None:
    for prompts in ((), ("a star", " ")):
        with pytest.raises(UsageError, match="empty"):
            calibration_plans(demo_checkpoint, (64, 64), prompts)
    with pytest.raises(RecipeError, match="prompts"):
        parse_recipe("schema = 1\n[calibrate]\nprompts = []\n", "x.toml")


def test_a_timestep_counts_what_its_noise_is_of_the_latent(demo_checkpoint: Checkpoint) -> None:
    import torch
    from diffusers import DDIMScheduler

    config = {name: value for name, value in demo_checkpoint.scheduler.items() if not name.startswith("_")}
    known = {name: config[name] for name in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
    scheduler: Any = DDIMScheduler(**known)
    noise = 1 - scheduler.alphas_cumprod
    weights = step_weights(demo_checkpoint.scheduler, (1.0, 501.0, 1.0, 951.0))
    assert [t for t, _ in weights] == [1.0, 501.0, 951.0]
    assert torch.allclose(torch.tensor([w for _, w in weights]), noise[[1, 501, 951]], atol=1e-5)
    assert step_weights({"beta_schedule": "squaredcos_cap_v2"}, (1.0,)) == ()


def test_scales_are_tuned_along_other_noise_and_no_caption_that_anyone_is_judged_by(
    demo_checkpoint: Checkpoint,
) -> None:
    plans = tuning_plans(demo_checkpoint, (64, 64))
    prompts = [prompt for plan in plans for prompt in plan.prompts]
    assert len(prompts) == 96
    judged = {scene.caption for scene in oracle_prompts(64, seed=0)}
    assert not judged & {text for plan in plans for text in (*plan.prompts, *plan.texts)}
    seeds = {plan.seed + index for plan in plans for index in range(len(plan.prompts))}
    assert len(seeds) == 96
    calibration = calibration_plans(demo_checkpoint, (64, 64))
    assert not seeds & {plan.seed + index for plan in calibration for index in range(len(plan.prompts))}
    assert not seeds & set(range(64))
    assert {step for plan in plans for step, _ in plan.picked} == set(range(20))


def test_scales_of_a_distilled_model_are_tuned_as_it_is_used(kind_folder: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(kind_folder("lcm"))
    (usual, *_) = calibration_plans(checkpoint, (64, 64))
    for plan in tuning_plans(checkpoint, (64, 64)):
        assert (plan.steps, plan.guidance_mode, plan.picked) == (usual.steps, usual.guidance_mode, usual.picked)


def test_prompts_of_a_recipe_are_drawn_from_more_than_one_noise_to_tune(demo_checkpoint: Checkpoint) -> None:
    plans = tuning_plans(demo_checkpoint, (64, 64), ("a red circle", "two stars"))
    assert {prompt for plan in plans for prompt in plan.prompts} == {"a red circle", "two stars"}
    assert not any(plan.texts for plan in plans)


def test_only_small_models_can_be_tuned(demo_checkpoint: Checkpoint) -> None:
    assert can_be_tuned(demo_checkpoint, (64, 64))
    assert not can_be_tuned(demo_checkpoint, (2048, 2048))
