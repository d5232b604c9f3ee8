"""What a model is calibrated with: real denoising trajectories of prompts that no gate uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from ...stages.artifacts import Checkpoint
from ...stages.errors import UsageError
from .probes import CHEAP_UNET, Branch, ProbePlan
from .prompts import calibration_prompts

SEED: Final = 1000
"""Noise of the first prompt; the gates begin at 0."""

_TUNING_SEED: Final = 2000

_THOROUGH: Final = 24  # prompts where a UNet call takes milliseconds: 8 calls of each, 192 together
_KEPT: Final = ((0, 6, 12, 18), (3, 9, 15, 19))
"""Steps of 20 that are kept of a stage's prompts, and of the next's: more prompts for as many calls, since the VAE,
which sees one latent of each, needs them most. With 24 the demo's decoder at 4.5 bits leaves 3 dB more than with 12."""
_FRUGAL: Final = 2  # prompts where it takes many seconds: 20 calls, 8 of which are kept
_TEXTS: Final = 96  # prompts for the text encoders, the drawn ones among them: words that none has are rounded blindly
VAE_SIDE: Final = 16
"""Rows and columns of latents of the VAE's samples where calls take seconds: 128 x 128 pixels of the middle."""

_TUNABLE: Final = 1e10
"""As `CHEAP_UNET`, for what runs a hundred times as often: minutes on two cores. The demo has 2e8."""

_TUNING: Final = 96  # trajectories that scales are tuned along
_TUNING_TOGETHER: Final = 12  # of them that one stage draws
_TUNING_TEXTS: Final = 288  # more prompts for the text encoders alone
_FEW_STEPS: Final = 8  # of a schedule: all of them are kept

_TOGETHER: Final = 8  # prompts that one stage draws, where that takes seconds; a search draws those of the first


def is_cheap(checkpoint: Checkpoint, size: tuple[int, int]) -> bool:
    """Whether a UNet call takes well under a second, so that hundreds may be made."""
    return _work(checkpoint, size) < CHEAP_UNET


def can_be_tuned(checkpoint: Checkpoint, size: tuple[int, int]) -> bool:
    """Whether a UNet call takes so few milliseconds that thousands may be made forwards and backwards."""
    return _work(checkpoint, size) < min(_TUNABLE, CHEAP_UNET)


def _work(checkpoint: Checkpoint, size: tuple[int, int]) -> int:
    """Parameters x latent positions of a UNet call."""
    scale = checkpoint.vae_scale
    return checkpoint.denoiser.parameters * (size[0] // scale) * (size[1] // scale)


def calibration_plans(
    checkpoint: Checkpoint, size: tuple[int, int], prompts: Sequence[str] | None = None
) -> tuple[ProbePlan, ...]:
    """The trajectories to draw, cut so that each plan is a stage: an interruption loses one of them.

    Both branches of guidance and timesteps from the first to the last, because activations of different steps differ.

    Args:
        prompts: the user's; None for the bundled ones.
    Raises:
        UsageError: `prompts` is empty, or one of them is.
    """
    cheap = is_cheap(checkpoint, size)
    texts: tuple[str, ...] = ()
    if prompts is None:
        known = calibration_prompts(checkpoint.tokenizer, _TEXTS)
        count = _THOROUGH if cheap else _FRUGAL
        prompts, texts = known[:count], tuple(dict.fromkeys(known[count:]))
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UsageError(
            "the list of calibration prompts is empty, or one of its prompts is",
            hint="name a few sentences of the checkpoint's own world, or leave the key out for the bundled ones",
        )
    variant = checkpoint.variant
    if variant.guidance_mode != "cfg":  # distilled: in the steps and with the guidance that it was made for
        every: tuple[tuple[int, Branch], ...] = tuple((step, "conditional") for step in range(variant.steps))
        how: dict[str, Any] = {
            "steps": variant.steps,
            "picked": every,
            "guidance": variant.guidance,
            "guidance_mode": variant.guidance_mode,
        }
        return tuple(
            ProbePlan((prompt,), () if index else texts, seed=SEED + index, **how)
            for index, prompt in enumerate(prompts)
        )
    both: tuple[Branch, ...] = ("conditional", "unconditional")
    if cheap:
        cuts = [tuple(prompts[at : at + _TOGETHER]) for at in range(0, len(prompts), _TOGETHER)]
        kept = tuple(tuple((step, branch) for step in steps for branch in both) for steps in _KEPT)
        if len(cuts) == 1:  # nobody else has the other half
            kept = (tuple(sorted(kept[0] + kept[1])),)
        return tuple(
            ProbePlan(cut, () if index else texts, 20, kept[index % len(kept)], seed=SEED + index * _TOGETHER)
            for index, cut in enumerate(cuts)
        )
    few: tuple[tuple[int, Branch], ...] = (
        (0, "conditional"),
        (1, "unconditional"),
        (3, "conditional"),
        (4, "conditional"),
    )
    return tuple(
        ProbePlan((prompt,), () if index else texts, 5, few, seed=SEED + index) for index, prompt in enumerate(prompts)
    )


def tuning_plans(
    checkpoint: Checkpoint, size: tuple[int, int], prompts: Sequence[str] | None = None
) -> tuple[ProbePlan, ...]:
    """The trajectories that scales are tuned along, a plan for a stage: many more than for calibration.

    Fitting by gradients needs them: along 48 prompts and 8 steps of each the demo's UNet gained 4.4 dB on what it was
    trained on, and 1.8 on other prompts.

    Args:
        prompts: the user's, each drawn from several noises; None for the bundled ones.
    """
    given = prompts or calibration_prompts(checkpoint.tokenizer, _TUNING)
    many = [given[index % len(given)] for index in range(_TUNING)]
    more = () if prompts else calibration_prompts(checkpoint.tokenizer, _TUNING + _TUNING_TEXTS)[_TUNING:]
    first = calibration_plans(checkpoint, size, many[:1])[0]
    branches = tuple(dict.fromkeys(branch for _, branch in first.picked))
    plans = []
    for number, at in enumerate(range(0, _TUNING, _TUNING_TOGETHER)):
        # neighbouring steps are alike: a plan keeps the even ones, the next the odd ones
        steps = range(number % 2, first.steps, 2) if first.steps > _FEW_STEPS else range(first.steps)
        share = slice(number, None, _TUNING // _TUNING_TOGETHER)
        plans.append(
            replace(
                first,
                prompts=tuple(many[at : at + _TUNING_TOGETHER]),
                texts=tuple(dict.fromkeys(more[share])),
                picked=tuple((step, branch) for step in steps for branch in branches),
                seed=_TUNING_SEED + at,
            )
        )
    return tuple(plans)


def step_weights(scheduler: Mapping[str, Any], timesteps: Iterable[float]) -> tuple[tuple[float, float], ...]:
    """(timestep, the share of noise in a latent at that timestep, as power) for each of `timesteps`.

    A latent is sqrt(a) x + sqrt(1 - a) e with a the product of (1 - beta) up to t ("Denoising Diffusion Probabilistic
    Models", Ho et al. 2020, equation 4), so an error in the predicted e moves it by (1 - a) of its power: at t = 1,
    where all of the answer is hard to see in the input and every rounding shows, that is a thousandth.

    Args:
        scheduler: scheduler_config.json. For betas that are given in another way than linear in themselves or in their
            roots there are no weights, and every timestep counts the same.
    """
    power = {"linear": 1.0, "scaled_linear": 0.5}.get(scheduler.get("beta_schedule", "linear"))
    if power is None or scheduler.get("trained_betas") is not None:
        return ()
    steps = int(scheduler.get("num_train_timesteps", 1000))
    first, last = (float(scheduler.get(name, usual)) for name, usual in (("beta_start", 1e-4), ("beta_end", 0.02)))
    betas = np.linspace(first**power, last**power, steps) ** (1 / power)
    noise = 1 - np.cumprod(1 - betas)
    return tuple((t, float(noise[min(max(round(t), 0), steps - 1)])) for t in sorted(set(timesteps)))
