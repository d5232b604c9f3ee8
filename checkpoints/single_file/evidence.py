"""What a single file's surroundings say and its shapes cannot: prediction type, noise schedule, size, latents' factor.

Sources, strongest first: the command line; a YAML of the original code (given, or beside the file under its name);
the file's own metadata (https://github.com/Stability-AI/ModelSpec) and marker tensors; what the family always is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ...stages.artifacts import Companions
from ...stages.errors import CheckpointError, UsageError

PREDICTIONS: Final = ("epsilon", "v_prediction")
_SPEC_PREDICTIONS: Final = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_YAML_PREDICTIONS: Final = {"eps": "epsilon", "v": "v_prediction"}
_SPEC_KEY: Final = "modelspec.prediction_type"
# how distilled models are called that have their base's shapes; no tensor gives them away
_DISTILLED: Final = re.compile(r"(?<![a-z])(turbo|lightning|lcm)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Facts with their source in words; None where nothing states them."""

    prediction: tuple[str, str] | None = None  # value, who says so
    zero_snr: bool = False  # trained with a schedule whose last step is pure noise
    scaling_factor: tuple[float, str] | None = None
    betas: tuple[float, float] | None = None
    pixels: int | None = None  # side of the pictures that the model was trained on
    unet: Mapping[str, Any] = field(default_factory=dict)  # keys of the UNet's configuration
    distilled: tuple[str, str] | None = None  # "turbo", "lightning" or "lcm", who says so


def gather(file: Path, names: Mapping[str, Any], metadata: Mapping[str, str], given: Companions) -> Evidence:
    """Collect what is known about `file`.

    Args:
        names: the file's tensors by name.
        metadata: the header's `__metadata__`.
    Raises:
        CheckpointError: a source cannot be read. UsageError: --prediction has another value.
    """
    stated = _yaml_of(file, given)
    found = _from_yaml(*stated) if stated else Evidence()
    prediction = found.prediction
    if prediction is None and metadata.get(_SPEC_KEY, "").lower() in _SPEC_PREDICTIONS:
        prediction = _SPEC_PREDICTIONS[metadata[_SPEC_KEY].lower()], f"the file's metadata, {_SPEC_KEY}"
    if prediction is None and "v_pred" in names:
        prediction = "v_prediction", "the file's marker tensor 'v_pred'"
    if given.prediction is not None:
        if given.prediction not in PREDICTIONS:
            raise UsageError(
                f"--prediction {given.prediction!r} is not known", hint=f"one of: {', '.join(PREDICTIONS)}"
            )
        prediction = given.prediction, "--prediction"
    return Evidence(
        prediction,
        "ztsnr" in names,
        found.scaling_factor,
        found.betas,
        found.pixels or _resolution(metadata),
        found.unet,
        _distilled(file, metadata),
    )


def _distilled(file: Path, metadata: Mapping[str, str]) -> tuple[str, str] | None:
    title = metadata.get("modelspec.title", "")
    for text, where in ((file.stem, "its name"), (title, "the file's metadata, modelspec.title")):
        if found := _DISTILLED.search(text):
            return found[1].lower(), where
    return None


def _yaml_of(file: Path, given: Companions) -> tuple[Path, Mapping[str, Any]] | None:
    import yaml

    beside = file.with_suffix(".yaml")  # where web interfaces look for it
    place = given.config if given.config is not None and given.config.is_file() else beside
    if not place.is_file():
        return None
    try:
        content = yaml.safe_load(place.read_text(encoding="utf-8"))
        params = content["model"]["params"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{place}: no configuration of the original code: {error}", hint="it has model.params; remove or mend it"
        ) from None
    if not isinstance(params, dict):
        raise CheckpointError(f"{place}: model.params is {params!r}, not a mapping")
    return place, params


def _from_yaml(place: Path, params: Mapping[str, Any]) -> Evidence:
    says = f"{place.name}, model.params"
    parameterization = params.get("parameterization", "eps")  # ldm's default
    if parameterization not in _YAML_PREDICTIONS:
        raise CheckpointError(f"{place}: parameterization {parameterization!r} is not known")
    unet = params.get("unet_config", params.get("network_config", {})).get("params", {})
    heads = {}
    if isinstance(unet.get("num_heads"), int) and unet["num_heads"] > 0:
        heads = {"attention_head_dim": unet["num_heads"]}  # diffusers' misnomer: the number of heads
    betas = None
    if "linear_start" in params and "linear_end" in params:
        betas = float(params["linear_start"]), float(params["linear_end"])
    factor = params.get("scale_factor")
    return Evidence(
        prediction=(_YAML_PREDICTIONS[parameterization], says),
        scaling_factor=(float(factor), says) if factor is not None else None,
        betas=betas,
        unet=heads,
    )


def _resolution(metadata: Mapping[str, str]) -> int | None:
    sides = metadata.get("modelspec.resolution", "").lower().split("x")
    return int(sides[0]) if len(sides) == 2 and sides[0] == sides[1] and sides[0].isdigit() else None
