"""diffusers' schedulers as the checkpoint's pipeline holds them, and what running one outside of a pipeline takes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from ..stages.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SCHEDULERS: Final = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}

# What the constructors of diffusers' pipelines set in a scheduler's configuration, where it has the key; all others
# take it as it is.
_REPAIRS: Final[Mapping[str, Mapping[str, Any]]] = {
    "StableDiffusionPipeline": {"steps_offset": 1},
    "StableDiffusionImg2ImgPipeline": {"steps_offset": 1},
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}

# Settings that make a step nonlinear. Neither suits latents, which are not confined to -1..1.
NONLINEAR: Final = ("clip_sample", "thresholding")


def default_scheduler(config: Mapping[str, Any]) -> str:
    """Our name of the checkpoint's own scheduler class.

    Raises:
        CheckpointError: scheduler_config.json names a class that cannot be compiled.
    """
    own = config.get("_class_name")
    for name, scheduler_class in SCHEDULERS.items():
        if scheduler_class == own:
            return name
    raise CheckpointError(
        f"scheduler_config.json: _class_name {own!r} cannot be compiled",
        hint=f"choose a scheduler: {', '.join(SCHEDULERS)}",
    )


def build_scheduler(config: Mapping[str, Any], name: str, pipeline: str = "StableDiffusionPipeline") -> Any:
    """diffusers' scheduler as `pipeline` holds it.

    Raises:
        CheckpointError: the configuration makes steps nonlinear, or states no betas.
    """
    import diffusers

    scheduler_class = getattr(diffusers, SCHEDULERS[name])
    for setting in NONLINEAR:
        if config.get(setting) and setting in inspect.signature(scheduler_class).parameters:
            raise CheckpointError(
                f"scheduler_config.json: {setting} is {config[setting]!r}: {name} is not linear with it",
                hint=f"set {setting} to false: it is meant for pixels, not for latents",
            )
    if config.get("beta_schedule") is None and config.get("trained_betas") is None:
        raise CheckpointError(
            "scheduler_config.json has neither beta_schedule nor trained_betas",
            hint="the noise schedule that the UNet was trained with has to be stated there",
        )
    scheduler = scheduler_class.from_config(dict(config))
    repairs = {**dict.fromkeys(NONLINEAR, False), **_REPAIRS.get(pipeline, {})}
    scheduler.register_to_config(**{key: value for key, value in repairs.items() if key in scheduler.config})
    return scheduler


def set_timesteps(scheduler: Any, steps: int, timesteps: tuple[int, ...] = ()) -> None:
    """Prepare `scheduler` for a run, as `retrieve_timesteps` of diffusers' pipelines does."""
    if timesteps:
        scheduler.set_timesteps(timesteps=list(timesteps))
    else:
        scheduler.set_timesteps(steps)


def step_arguments(scheduler: Any, eta: float) -> dict[str, Any]:
    """Keyword arguments of `step`, as StableDiffusionPipeline.prepare_extra_step_kwargs chooses them."""
    accepted = inspect.signature(scheduler.step).parameters
    offered = {"eta": eta, "return_dict": False}
    return {name: value for name, value in offered.items() if name in accepted}


@contextmanager
def noise_from(scheduler: Any, draw: Callable[..., Tensor]) -> Iterator[None]:
    """Let `scheduler` take its noise from `draw` instead of diffusers' `randn_tensor`."""
    module = sys.modules[type(scheduler).__module__]
    original = getattr(module, "randn_tensor", None)
    if original is None:  # a deterministic solver: PNDM and UniPC do not even import it
        yield
        return
    setattr(module, "randn_tensor", draw)  # noqa: B010 - the module is only known at run time
    try:
        yield
    finally:
        setattr(module, "randn_tensor", original)  # noqa: B010


@contextmanager
def kept_in_double() -> Iterator[None]:
    """Undo the `sample.to(torch.float32)` of some schedulers: coefficients are read in double precision."""
    import torch
    from torch.overrides import TorchFunctionMode

    class KeepDouble(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            narrowed = function is torch.Tensor.to and args[0].dtype == torch.float64 and result.dtype == torch.float32
            return args[0] if narrowed else result

    with KeepDouble():
        yield
