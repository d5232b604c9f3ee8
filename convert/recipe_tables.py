"""The tables of a recipe, and what each of their keys may say. docs/recipes.md is for their readers."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from ..quantize.rounding import Activations, Method, Ranges
from ..stages.strict import Strict
from .rules import Rule, scheme_name

AUTO: Final = "auto"  # as a precision: the smallest that passes its gates and is not slower than fp32 here

SchedulerName = Literal["ddim", "euler", "euler_a", "pndm", "dpmpp_2m", "unipc", "lcm", "tcd"]
"""What export/scheduler.py names; a test compares the two."""


def _precision(name: str) -> str:
    from ..quantize.scheme import KEEP

    if name == AUTO:
        return name
    if name == KEEP:
        hint = {"hint": "fp32 for all; keep is for rules"}
        raise PydanticCustomError("scheme", "a precision is what all components are stored at", hint)
    return scheme_name(name)


def _whole_latents(size: tuple[int, int]) -> tuple[int, int]:
    if any(side <= 0 or side % 8 for side in size):
        hint = "height and width in pixels, e.g. [512, 512]"
        raise PydanticCustomError("size", "both sides must be positive multiples of 8", {"hint": hint})
    return size


def _falling(values: tuple[int, ...]) -> tuple[int, ...]:
    if list(values) != sorted(set(values), reverse=True):
        raise PydanticCustomError("falling", "timesteps must fall, from noise to picture")
    return values


def _a_list(value: Any) -> Any:
    if isinstance(value, str):
        hint = {"hint": f"prompts is a list; for a file with a prompt a line: prompts_file = {json.dumps(value)}"}
        raise PydanticCustomError("prompts", "should be a list of prompts", hint)
    return tuple(value) if isinstance(value, list) else value


def _prompts(values: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if values is not None and not all(value.strip() for value in values or ("",)):
        hint = {"hint": "name a few sentences of the checkpoint's own world, or leave the key out for bundled ones"}
        raise PydanticCustomError("prompts", "should be prompts, none of them empty", hint)
    return values


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise PydanticCustomError("distinct", "the same value is listed twice")
    return values


Precision = Annotated[str, AfterValidator(_precision)]
Size = Annotated[tuple[int, int], AfterValidator(_whole_latents)]
Steps = Annotated[int, Field(ge=1, le=1000)]
Timestep = Annotated[int, Field(ge=0, lt=1000)]
OrtForm = Literal["onnx", "ort"]


class ModelChoice(Strict):
    """`[model]`"""

    family: str | None = None  # None: whatever the checkpoint is


class ExportChoice(Strict):
    """`[export]`"""

    size: Size | None = None  # height, width in pixels; None: the checkpoint's own


class QuantizeChoice(Strict):
    """`[quantize]`: a scheme for all, then rules in order, of which the last match wins; and how to round."""

    precision: Precision = "fp16"
    rounding: Method = "nearest"  # to integer codes
    activations: Activations | None = None  # to 8 bits; None: as the target does best
    rules: tuple[Rule, ...] = ()


class CalibrateChoice(Strict):
    """`[calibrate]`: what methods that look at activations run the model on."""

    prompts: Annotated[tuple[str, ...] | None, BeforeValidator(_a_list), AfterValidator(_prompts)] = None  # bundled
    prompts_file: Annotated[str, Field(min_length=1)] | None = None  # a prompt a line; beside the recipe
    ranges: Ranges = "percentile"  # of static activations


class OrtChoice(Strict):
    """`[target.ort]`"""

    forms: Annotated[tuple[OrtForm, ...], Field(min_length=1), AfterValidator(_distinct)] = ("onnx", "ort")


class TargetChoice(Strict):
    """`[target]`: `name` serves where the command line names no target."""

    name: str | None = None
    ort: OrtChoice = OrtChoice()


class Compiled(Strict):
    """One scheduler, compiled for several step counts."""

    name: SchedulerName
    steps: Annotated[tuple[Steps, ...], Field(min_length=1), AfterValidator(_distinct)]


# LCM and TCD need a checkpoint distilled for them.
_USUAL: Final[tuple[SchedulerName, ...]] = ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "pndm")
_USUAL_STEPS: Final = (10, 20, 25, 30, 50)


class ScheduleChoice(Strict):
    """`[schedule]`: the default, and what else the bundle carries ready-made."""

    default: Literal["checkpoint", SchedulerName] = "checkpoint"
    steps: Steps | None = None  # None: what the checkpoint was made for, 20 where nothing was distilled
    timesteps: Annotated[tuple[Timestep, ...], AfterValidator(_falling)] = ()  # of the default, in place of its choice
    also: tuple[Compiled, ...] = tuple(Compiled(name=name, steps=_USUAL_STEPS) for name in _USUAL)


class GuidanceChoice(Strict):
    """`[guidance]`: the scale that an app starts with, 1 and below is none; and how the UNet is guided."""

    default: Annotated[float, Field(ge=0.0, le=100.0)] | None = None  # None: what the checkpoint was made for
    mode: Literal["auto", "cfg", "embedded", "none"] = "auto"  # auto: told from the checkpoint


class BundleChoice(Strict):
    """`[bundle]`: what else goes into it."""

    goldens: bool = False  # golden vectors, by which a port of text-to-image can be checked on the device


class ValidateChoice(Strict):
    """`[validate]`: which prompts and steps the gate uses; `auto` chooses by the model's size."""

    plan: Literal["auto"] = "auto"
