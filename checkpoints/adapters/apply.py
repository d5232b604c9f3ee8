"""Adapters and a checkpoint: every module matched, checked and noted at the parameter that it changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ...stages.artifacts import Adapted, AdapterSource, ComponentSource
from ...stages.errors import CheckpointError
from ..weights import Weights
from .factors import changes
from .file import AdapterFile, read_adapter
from .match import match
from .words import add_words

# Nothing in the tensors of an LCM-LoRA says what it is; its makers and its users say it in names.
_LCM: Final = re.compile(r"(^|[^a-z])lcm([^a-z]|$)", re.IGNORECASE)
_LCM_STEPS: Final = 50  # original_inference_steps of latent-consistency/lcm-lora-*
_OF_OTHERS: Final = ("skip_prk_steps", "use_karras_sigmas", "interpolation_type", "lower_order_final", "solver_order")


def apply_adapters(
    components: Mapping[str, ComponentSource], given: tuple[tuple[Path, float], ...]
) -> tuple[dict[str, ComponentSource], tuple[AdapterSource, ...], dict[str, Path]]:
    """`components` with the adapters noted in `adapted`; what each adapter is; and its files by label.

    Reads headers only: the change itself happens tensor by tensor whenever one is read (`Weights.read`).

    Raises:
        CheckpointError: nothing or only a part of an adapter matches, or a factor fits no weight.
    """
    weights = _weights(components)
    shapes = {name: {n: w.spec(n)[1] for n in w.names()} for name, w in weights.items()}
    names = {name: (*w.names(), *w.unused()) for name, w in weights.items()}
    found: dict[str, list[Adapted]] = {name: list(source.adapted) for name, source in components.items()}
    sources, places = [], {}
    words: tuple[str, ...] = ()
    for number, (place, scale) in enumerate(given, start=1):
        adapter = read_adapter(place)
        label = f"adapters/{number}/{adapter.weights.name}"
        places[label] = adapter.weights
        if adapter.embeddings:
            rows, tokens = add_words(adapter, components, shapes, scale, words)
            words += tokens
            for component, change in rows.items():
                found[component].append(change)
            sources.append(AdapterSource(adapter.label, label, scale, dict.fromkeys(rows, 1), words=tokens))
            continue
        counts: dict[str, int] = {}
        idle = 0
        for component, module, stored in match(adapter, components, names):
            if f"{module}.weight" not in shapes[component]:
                idle += 1  # SDXL's text encoders end before their last layer, and adapters are trained on all
                continue
            shape = shapes[component][f"{module}.weight"]
            for change in changes(adapter, component, module, stored, shape, scale):
                if change.parameter not in shapes[component]:
                    raise CheckpointError(f"--adapter {place}: {component} has no {change.parameter}")
                found[component].append(change)
                counts[component] = counts.get(component, 0) + 1
        if adapter.config is not None:
            places[f"adapters/{number}/{adapter.config.name}"] = adapter.config
        distilled = "lcm" if _is_lcm(adapter) else ""
        sources.append(AdapterSource(adapter.label, label, scale, counts, distilled, idle=idle))
    changed = {
        name: replace(source, adapted=tuple(found[name]), config=_with_words(source, words))
        for name, source in components.items()
    }
    return changed, tuple(sources), places


def _with_words(source: ComponentSource, words: tuple[str, ...]) -> Mapping[str, Any]:
    if not words or not source.component.startswith("text_encoder"):
        return source.config
    return {**source.config, "vocab_size": source.config["vocab_size"] + len(words)}


def adapted_scheduler(scheduler: Mapping[str, Any], adapters: tuple[AdapterSource, ...]) -> dict[str, Any]:
    """The checkpoint's scheduler, or LCM's where an adapter makes the model a latent consistency model."""
    if not any(adapter.distilled == "lcm" for adapter in adapters):
        return dict(scheduler)
    kept = {name: value for name, value in scheduler.items() if name not in _OF_OTHERS}
    return {
        **kept,
        "_class_name": "LCMScheduler",
        "original_inference_steps": _LCM_STEPS,
        "timestep_spacing": "leading",
    }


def remarks_on(adapters: tuple[AdapterSource, ...]) -> tuple[str, ...]:
    """What people should know about the adapters that are merged."""
    said = []
    for adapter in adapters:
        if adapter.words:
            vectors = "one vector" if len(adapter.words) == 1 else f"{len(adapter.words)} vectors"
            said.append(f"adapter {adapter.label} adds the word {adapter.words[0]!r}, of {vectors}")
            continue
        parts = ", ".join(f"{count} of {component}" for component, count in adapter.parameters.items())
        said.append(f"adapter {adapter.label} at {adapter.scale:g} changes {parts}")
        if adapter.idle:
            said.append(f"adapter {adapter.label} also changes {adapter.idle} modules that nothing computes with")
        if adapter.distilled == "lcm":
            said.append(f"adapter {adapter.label} is an LCM-LoRA by its name: LCM's schedule, no guidance")
    return tuple(said)


def _is_lcm(adapter: AdapterFile) -> bool:
    # the published ones have diffusers' file name, in a folder that says what they are
    says_nothing = adapter.weights.stem in ("pytorch_lora_weights", "adapter_model")
    folder = adapter.weights.parent.name if says_nothing else ""
    titles = [value for key, value in adapter.metadata.items() if key in ("modelspec.title", "ss_output_name")]
    return any(_LCM.search(text) for text in (adapter.weights.stem, folder, *titles))


def _weights(components: Mapping[str, ComponentSource]) -> dict[str, Weights]:
    return {name: Weights(source) for name, source in components.items() if not name.startswith("vae")}
