"""Compiled schedules agree with diffusers, and what cannot be compiled is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from diffusette.export.accessories import CompileSchedules
from diffusette.export.compile_schedule import AGREEMENT, compile_schedule, measure_disagreement
from diffusette.export.scheduler import SCHEDULERS, default_scheduler
from diffusette.stages.errors import CheckpointError, UsageError

CONFIG: Final[Mapping[str, Any]] = json.loads(
    (Path(__file__).resolve().parents[2] / "demo/scheduler/scheduler_config.json").read_text()
)
V_PREDICTION: Final = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [4, 20, 50])
def test_a_replay_agrees_with_diffusers_on_the_whole_trajectory(scheduler: str, steps: int) -> None:
    compiled = compile_schedule(CONFIG, scheduler, steps)
    assert 0 < measure_disagreement(CONFIG, compiled) < AGREEMENT


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "pndm"])
def test_v_prediction_with_zero_terminal_snr_compiles(scheduler: str) -> None:
    compiled = compile_schedule({**CONFIG, **V_PREDICTION}, scheduler, 10)
    assert compiled.prediction_type == "v_prediction"
    assert compiled.rows[0].timestep == 999


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "tcd"])
def test_eta_makes_the_solver_draw_noise(scheduler: str, eta: float) -> None:
    assert not any(row.noise for row in compile_schedule(CONFIG, scheduler, 8).rows)
    assert all(row.noise for row in compile_schedule(CONFIG, scheduler, 8, eta=eta).rows[:-1])


@pytest.mark.parametrize("setting", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_other_sigma_spacings_compile(setting: str) -> None:
    compiled = compile_schedule({**CONFIG, "_class_name": "DPMSolverMultistepScheduler", setting: True}, "dpmpp_2m", 12)
    assert compiled.rows != compile_schedule(CONFIG, "dpmpp_2m", 12).rows


def test_pndm_makes_one_call_more_than_steps() -> None:
    """It looks back at four outputs, but not at that of the repeated call, so five have to be kept."""
    compiled = compile_schedule({**CONFIG, "skip_prk_steps": True}, "pndm", 20)
    assert (compiled.steps, len(compiled.rows), compiled.history) == (20, 21, 5)


def test_ddim_coefficients_are_those_of_the_paper() -> None:
    """Song et al. 2021, equation 12, with sigma 0."""
    compiled = compile_schedule(CONFIG, "ddim", 20)
    betas = np.linspace(CONFIG["beta_start"] ** 0.5, CONFIG["beta_end"] ** 0.5, 1000) ** 2
    alpha = np.cumprod(1 - betas)
    row = compiled.rows[3]
    now, following = alpha[int(row.timestep)], alpha[int(row.timestep) - 50]
    assert row.latent == pytest.approx(np.sqrt(following / now), rel=1e-5)
    assert row.outputs == pytest.approx(
        (np.sqrt(1 - following) - np.sqrt(following / now) * np.sqrt(1 - now),), rel=1e-4
    )
    assert (row.signal, row.noise_level) == pytest.approx((np.sqrt(now), np.sqrt(1 - now)), rel=1e-5)


def test_euler_divides_what_the_model_sees_by_the_noise_level() -> None:
    row = compile_schedule(CONFIG, "euler", 10).rows[0]
    assert row.signal == 1
    assert row.input_scale == pytest.approx(1 / np.hypot(1, row.noise_level), rel=1e-6)


@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_nonlinear_settings_are_refused_by_name(setting: str) -> None:
    with pytest.raises(CheckpointError, match=setting):
        compile_schedule({**CONFIG, setting: True}, "ddim", 10)


@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_a_solver_that_does_not_have_a_setting_is_not_refused_for_it(setting: str) -> None:
    assert compile_schedule({**CONFIG, setting: True}, "euler", 10) == compile_schedule(CONFIG, "euler", 10)


@pytest.mark.parametrize("pipeline", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_clipping_that_only_diffusers_defaults_switch_on_is_off(pipeline: str) -> None:
    silent = {key: value for key, value in CONFIG.items() if key != "clip_sample"}
    assert compile_schedule(silent, "ddim", 5, pipeline=pipeline) == compile_schedule(
        CONFIG, "ddim", 5, pipeline=pipeline
    )


def test_an_outdated_steps_offset_is_repaired_as_in_the_pipeline() -> None:
    assert compile_schedule({**CONFIG, "steps_offset": 0}, "ddim", 5) == compile_schedule(CONFIG, "ddim", 5)


def test_a_solver_that_remembers_noise_is_refused() -> None:
    config = {**CONFIG, "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    with pytest.raises(CheckpointError, match="noise of an earlier step"):
        compile_schedule(config, "dpmpp_2m", 10)


def test_a_nonlinear_solver_is_caught_on_the_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDIMScheduler

    honest = DDIMScheduler.step

    def step(self: Any, output: Any, timestep: Any, sample: Any, **how: Any) -> Any:
        return (honest(self, output, timestep, sample, **how)[0] * 1.0 + 1e-3 * sample.clamp(max=0.5) - 1e-3 * sample,)

    monkeypatch.setattr(DDIMScheduler, "step", step)
    with pytest.raises(CheckpointError, match="away from diffusers"):
        compile_schedule(CONFIG, "ddim", 10)


def test_a_configuration_without_betas_is_refused() -> None:
    with pytest.raises(CheckpointError, match="beta_schedule"):
        compile_schedule({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "euler", 10)


def test_unknown_names_and_impossible_counts_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="eulr") as unknown:
        compile_schedule(CONFIG, "eulr", 10)
    assert "euler" in unknown.value.hint
    with pytest.raises(UsageError, match="51 steps"):
        compile_schedule(CONFIG, "lcm", 51)
    with pytest.raises(UsageError, match="0 steps"):
        compile_schedule(CONFIG, "euler", 0)
    with pytest.raises(UsageError, match="eta"):
        compile_schedule(CONFIG, "euler", 10, eta=0.5)


def test_diffusers_draws_its_own_noise_again_afterwards() -> None:
    module: Any = import_module("diffusers.schedulers.scheduling_euler_ancestral_discrete")
    from diffusers.utils.torch_utils import randn_tensor

    compile_schedule(CONFIG, "euler_a", 4)
    assert module.randn_tensor is randn_tensor


def test_given_timesteps_take_the_place_of_the_schedulers_choice() -> None:
    given = (999, 749, 499, 249)
    compiled = compile_schedule(CONFIG, "lcm", 4, timesteps=given)
    assert tuple(row.timestep for row in compiled.rows) == given
    assert compiled.rows != compile_schedule(CONFIG, "lcm", 4).rows
    with pytest.raises(UsageError, match="4 timesteps were given for 3 steps"):
        compile_schedule(CONFIG, "lcm", 3, timesteps=given)
    with pytest.raises(UsageError, match="cannot do 4 steps"):
        compile_schedule(CONFIG, "ddim", 4, timesteps=given)


def test_pipelines_without_repairs_take_the_configuration_as_it_is() -> None:
    outdated = {**CONFIG, "steps_offset": 2}
    repaired = compile_schedule(outdated, "ddim", 5)
    assert compile_schedule(outdated, "ddim", 5, pipeline="StableDiffusionXLPipeline") != repaired


def test_what_cannot_be_compiled_is_told_once_for_all_its_counts(tmp_path: Path) -> None:
    """PNDM with the settings of an SDXL checkpoint's DPM solver ends at timestep 0, where nothing is left."""
    betas = {key: CONFIG[key] for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
    config = {**betas, "_class_name": "DPMSolverMultistepScheduler", "steps_offset": 0, "timestep_spacing": "linspace"}
    wanted = (("checkpoint", 4), ("pndm", 10), ("ddim", 4), ("pndm", 20))
    compiled = CompileSchedules(config, wanted, "StableDiffusionXLInpaintPipeline").run(tmp_path)
    assert compiled.compiled == (("dpmpp_2m", 4), ("ddim", 4))
    assert compiled.remarks() == ["no schedule for pndm at 10, 20 steps: its last step ignores the model"]


def test_the_default_scheduler_is_the_checkpoints_own() -> None:
    assert default_scheduler(CONFIG) == "ddim"
    assert default_scheduler({"_class_name": "UniPCMultistepScheduler"}) == "unipc"
    with pytest.raises(CheckpointError, match="HeunDiscreteScheduler"):
        default_scheduler({"_class_name": "HeunDiscreteScheduler"})
