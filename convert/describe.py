"""What a path is: a checkpoint (and what converting it would cost), an ONNX graph, or a bundle."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from ..bundle.manifest import MANIFEST
from ..stages.artifacts import ALONE, Companions
from ..stages.cache import Cache
from ..stages.errors import ModelError
from ..stages.extras import require_converter
from ..stages.hashing import sha256_of_file
from .recipe import load_recipe, merged, parameters_of
from .recipe_tables import AUTO


def describe(
    path: str,
    *,
    targets: tuple[str, ...] = (),
    precision: str | None = None,
    size: tuple[int, int] | None = None,
    companions: Companions = ALONE,
    gate: bool = True,
) -> dict[str, Any]:
    """Facts about `path`, JSON-able; `kind` says which sort. No weight is read.

    Raises:
        CheckpointError, BundleError, ModelError: it is none of them, or a damaged one.
    """
    place = Path(path)
    if place.suffix == ".onnx" and _is_file(place):
        return _onnx(place)
    if _is_file(place / MANIFEST):
        return _bundle(place)
    return _checkpoint(path, targets, precision, size, companions, gate)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be entered: opening it as a checkpoint says which
        return False


def _checkpoint(
    path: str,
    targets: tuple[str, ...],
    precision: str | None,
    size: tuple[int, int] | None,
    companions: Companions,
    gate: bool,
) -> dict[str, Any]:
    require_converter(f"inspecting the checkpoint {path}")
    from ..checkpoints.checkpoint import open_checkpoint
    from ..runtimes.registry import TARGETS, get_target
    from ..stages.limits import memory_available_mib
    from .forecast import forecast
    from .sampling import recipe_for, sampling_of

    source = open_checkpoint(path, companions=companions, survey=False)
    variant = source.variant
    recipe = merged(load_recipe(recipe_for(source)), precision=precision, size=size)
    sampling = sampling_of(source, recipe)
    names = targets or tuple(TARGETS)
    for name in names:
        get_target(name)
    pixels = recipe.size_for(source)
    settled = recipe.settled("fp32") if recipe.quantize.precision == AUTO else recipe
    labels = {name: plan.label for name, plan in settled.plans(parameters_of(source)).items()}
    needed = forecast(source, names, labels, pixels, gate=gate)
    return {
        "kind": "checkpoint",
        "name": source.name,
        "family": source.family,
        "why": source.why,
        "remarks": list(source.remarks),
        "size": list(pixels),
        "scheduler": source.scheduler["_class_name"],
        "prediction_type": variant.prediction_type,
        "prediction_why": variant.prediction_why,
        "variant": variant.label,
        "variant_why": variant.why,
        "input_channels": variant.input_channels,
        "guidance": {"mode": sampling.mode, "default": sampling.guidance},
        "steps": sampling.steps,
        "recipe": recipe.name,
        "components": {
            name: {"parameters": part.parameters, "dtype": part.dtype} for name, part in source.components.items()
        },
        "targets": list(names),
        "precision": recipe.quantize.precision,
        "forecast": needed.to_json(),
        "available_mib": round(memory_available_mib()),
    }


def _bundle(path: Path) -> dict[str, Any]:
    from ..bundle.bundle import open_bundle

    bundle = open_bundle(path)
    facts = bundle.manifest
    schedules: dict[str, list[int]] = {}
    for schedule in bundle.schedules():
        schedules.setdefault(schedule.scheduler, []).append(schedule.steps)
    return {
        "kind": "bundle",
        "name": facts.name,
        "family": facts.family,
        "target": facts.target.model_dump(),
        "gate": facts.gate,
        "size": list(facts.size),
        "components": {
            name: {
                "precision": part.precision,
                "bits_per_weight": part.bits_per_weight,
                "bytes": sum(file.bytes for file in part.files),
                "forms": sorted(part.forms),
                "inputs": [tensor.model_dump(mode="json") for tensor in part.inputs],
                "outputs": [tensor.model_dump(mode="json") for tensor in part.outputs],
                "notes": list(part.notes),
            }
            for name, part in facts.components.items()
        },
        "schedules": schedules,
        "guidance": facts.guidance.model_dump(),
        "conditioning": facts.conditioning.model_dump(),
        "control": facts.control.model_dump() if facts.control else None,
        "added_tokens": list(facts.tokenizer.added_tokens),
        "steps": facts.schedule.default["steps"],
        "prediction_type": facts.schedule.prediction_type,
        "timestep_spacing": facts.schedule.timestep_spacing,
        "parity": {name: entry.model_dump() for name, entry in facts.parity.items()},
        "memory": facts.memory.model_dump(),
        "conversion": Cache.default().find_memory(sha256_of_file(path / MANIFEST)),
    }


def _onnx(path: Path) -> dict[str, Any]:
    require_converter(f"inspecting the ONNX file {path}")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError:
        raise ModelError(f"{path} is not an ONNX file", hint="its content could not be parsed as protobuf") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}", hint="check its rights") from None
    if not model.graph.node:  # no bytes at all are a valid protobuf message, one with every field at its default
        raise ModelError(f"{path} is not an ONNX file: no nodes in it", hint="copy or export it again")
    ops = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    weights = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    return {
        "kind": "onnx",
        "name": path.name,
        "opset": max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=None),
        "nodes": len(model.graph.node),
        "parameters": sum(weights.values()),
        "inputs": [_value(value) for value in model.graph.input if value.name not in weights],
        "outputs": [_value(value) for value in model.graph.output],
        "ops": dict(ops.most_common()),
    }


def _value(value: Any) -> dict[str, Any]:
    """Name, dtype and shape; "unknown" stands for what the graph does not say, and for sequences and maps."""
    from onnx import helper

    kind = value.type.tensor_type
    try:
        dtype = str(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    except KeyError:
        dtype = "unknown"
    shape = [(dim.dim_param or dim.dim_value) if dim.WhichOneof("value") else "unknown" for dim in kind.shape.dim]
    return {"name": value.name, "dtype": dtype, "shape": shape if kind.HasField("shape") else "unknown"}
