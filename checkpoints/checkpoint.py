"""Opening a checkpoint: what it is, whether it is whole, and where its weights lie. Nothing in it is executed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ..stages.artifacts import ALONE, Checkpoint, Companions, ComponentSource, sole
from ..stages.errors import CheckpointError
from . import controlnet, tiny_decoder
from .adapters.apply import adapted_scheduler, apply_adapters, remarks_on
from .config import architecture, pixels_per_latent, vae_pixels_per_latent, with_pixels_per_latent
from .controlnet import read_controlnet, taking_residuals
from .diffusers_folder import INDEX
from .families import Family, Part, recognise, refuse_unsupported
from .families.variant import tell_variant
from .folder_layout import read_folder
from .layout import Layout, PartWeights
from .loose_file import is_single_file, refuse_loose
from .single_file.tokenizer import size_of
from .surveyed import surveyed
from .tiny_decoder import read_tiny_decoder
from .weights import current_names

DEMO: Final = "demo"
DEMO_FOLDER: Final = Path(__file__).resolve().parent.parent / "demo"
_WEIGHT_DTYPES: Final = ("float32", "float16", "bfloat16", "float64")


def open_checkpoint(
    path: Path | str,
    *,
    companions: Companions = ALONE,
    memo: Path | None = None,
    survey: bool = True,
) -> Checkpoint:
    """Recognise the checkpoint at `path`, check it, and point at its parts.

    Everything but NaN weights is told from configs and headers, before any weight is read.

    Args:
        path: a diffusers folder, or a single file of the original code; the word "demo" is the embedded checkpoint
            (for a folder of yours with that name, give its absolute path).
        companions: what is given beside it.
        memo: folder that remembers what a pass over a weight file found; None reads every weight file again.
        survey: False reads headers only, in milliseconds for any size, and leaves every `digest` and the values of
            `sources` empty: enough to say what a checkpoint is, not enough to convert it.
    Raises:
        CheckpointError: there is none, the family is not supported, a component is missing or damaged, weights lie
            in a pickle, or are NaN or infinite.
    """
    is_demo = str(path) == DEMO
    root = DEMO_FOLDER if is_demo else Path(path).absolute()
    given = _absolute(companions)
    try:
        layout = _take_apart(root, given)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CheckpointError(
            f"{root}: cannot be opened: {error.strerror}", hint="check the path and its rights"
        ) from None
    family, why = recognise(replace(layout.headers, tensors={}), str(root))
    refuse_unsupported(layout.headers, str(root))  # configs can lie about what the weights are
    components = _with_latents({name: _component(family, name, layout) for name in family.components})
    beside: dict[str, Path] = {}
    remarks: tuple[str, ...] = ()
    denoiser = sole("denoiser", components)
    if given.vae_decoder is not None:
        channels = components[denoiser].config["out_channels"]
        pixels = vae_pixels_per_latent(components["vae_decoder"].config)
        config, weights, places = read_tiny_decoder(given.vae_decoder, channels, pixels)
        components["vae_decoder"] = _source(family, "vae_decoder", config, weights, given.vae_decoder)
        beside |= places
    plain = components
    components, adapters, more = apply_adapters(components, given.adapters)
    if any(adapter.words for adapter in adapters):
        _refuse_gap(plain, layout)
    if given.controlnet is None and "controlnet" in layout.headers.parts:
        given = replace(given, controlnet=root / "controlnet")  # a pipeline that was saved with one
    if given.controlnet is not None:
        part = family.part("controlnet")
        config, weights, places, remarks = read_controlnet(given.controlnet, components[denoiser], part)
        config = with_pixels_per_latent(config, pixels_per_latent(components[denoiser].config))
        components["controlnet"] = _source(family, "controlnet", config, weights, given.controlnet)
        components[denoiser] = taking_residuals(components[denoiser])
        beside |= places
    places = {**layout.places, **beside, **more}
    scheduler = adapted_scheduler(_completed_scheduler(layout), adapters)
    checkpoint = Checkpoint(
        name=DEMO if is_demo else root.name if root.is_dir() else root.stem,
        root=root,
        family=family.name,
        why=why if root.is_dir() else f"a single file of the original code: {why.replace(' in model_index.json', '')}",
        components=components,
        scheduler=scheduler,
        tokenizer=layout.tokenizer,
        sources=dict.fromkeys(sorted(places), ""),
        digest="",
        variant=tell_variant(family, components[denoiser].config, scheduler, root, layout.prediction_why),
        places=places,
        companions=given,
        adapters=adapters,
        remarks=layout.remarks + remarks + remarks_on(adapters),
        tokenizer_2=layout.tokenizer_2,
        pipeline=layout.headers.pipeline,
        settings=layout.headers.settings,
    )
    return surveyed(checkpoint, memo) if survey else checkpoint


def _refuse_gap(components: Mapping[str, ComponentSource], layout: Layout) -> None:
    """New words get the ids behind a tokenizer's last, and rows behind an embedding's last: both must be the same."""
    for name, folder in (("text_encoder", layout.tokenizer), ("text_encoder_2", layout.tokenizer_2)):
        if folder is not None and name in components:
            tokens, rows = size_of(folder), components[name].config["vocab_size"]
            if tokens != rows:
                raise CheckpointError(
                    f"{folder}: {tokens} tokens, {name} has embeddings for {rows}: new words cannot be added",
                    hint="leave the textual inversion out",
                )


def _absolute(given: Companions) -> Companions:
    def found(option: str, place: Path | None) -> Path | None:
        if place is not None and not place.exists():
            raise CheckpointError(f"{option} {place}: no such file or folder", hint="check the path")
        return place.absolute() if place is not None else None

    return replace(
        given,
        vae=found("--vae", given.vae),
        vae_decoder=found(tiny_decoder.OPTION, given.vae_decoder),
        controlnet=found(controlnet.OPTION, given.controlnet),
        tokenizer=found("--tokenizer", given.tokenizer),
        config=found("--config", given.config),
        adapters=tuple((place.absolute(), scale) for place, scale in given.adapters),
    )


def _take_apart(root: Path, given: Companions) -> Layout:
    if (root / INDEX).is_file():
        layout = read_folder(root, given)
    elif is_single_file(root):
        from .single_file.open import read_single_file

        layout = read_single_file(root, given)
    else:
        refuse_loose(root)
    if given.vae is None:
        return layout
    from .single_file.vae import with_vae

    return with_vae(layout, given.vae)


def _with_latents(components: Mapping[str, ComponentSource]) -> dict[str, ComponentSource]:
    """`components`, the UNet told how large the VAE's latents are."""
    name, decoder = sole("denoiser", components), sole("decoder", components)
    config = with_pixels_per_latent(components[name].config, vae_pixels_per_latent(components[decoder].config))
    return {**components, name: replace(components[name], config=config)}


def _component(family: Family, name: str, layout: Layout) -> ComponentSource:
    part = family.components[name]
    config = _completed_config(part, layout)
    return _source(family, name, config, layout.weights[part.folder], layout.root / part.folder)


def _source(family: Family, name: str, config: Mapping[str, Any], stored: PartWeights, where: Path) -> ComponentSource:
    tensors = current_names(stored.tensors, family.part(name))
    if not tensors:
        raise CheckpointError(f"{where}: no tensor of {name} in it", hint="the weights are of another model")
    values: Counter[str] = Counter()
    for tensor in tensors.values():
        values[tensor.dtype] += math.prod(tensor.shape)
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name!r} is stored as {tensor.dtype}",
                hint=f"weights must be one of {', '.join(_WEIGHT_DTYPES)}: take a checkpoint that is not quantized",
            )
    return ComponentSource(
        component=name,
        family=family.name,
        config=config,
        files=stored.files,
        digest="",
        parameters=values.total(),
        dtype=values.most_common(1)[0][0],
        tensors=tuple(replace(tensor, name=now) for now, tensor in tensors.items()) if stored.renamed else (),
    )


def _completed_config(part: Part, layout: Layout) -> dict[str, Any]:
    """The config with what old versions leave out; unknown keys stay, as diffusers itself ignores them."""
    stated = layout.headers.parts[part.folder]
    if stated not in part.classes:
        raise CheckpointError(
            f"{layout.root / INDEX}: {part.folder} is a {stated}, not a {' or '.join(part.classes)}",
            hint="this component is not supported yet",
        )
    raw = layout.headers.configs[part.folder]
    for key, kind in part.required.items():
        if not isinstance(raw.get(key), kind):
            found = f"{raw[key]!r}" if key in raw else "missing"
            raise CheckpointError(
                f"{layout.config_place(part.folder)}: {key!r} is {found}, a {kind.__name__} is needed",
                hint="take config.json from the same checkpoint as the weights",
            )
    return {**part.defaults, **architecture(raw)}


def _completed_scheduler(layout: Layout) -> dict[str, Any]:
    config = dict(layout.headers.configs["scheduler"])
    file = layout.config_place("scheduler")
    if not isinstance(config.setdefault("_class_name", layout.headers.parts["scheduler"]), str):
        raise CheckpointError(f"{file}: _class_name is {config['_class_name']!r}, not a name")
    if config.get("lambda_min_clipped") == -math.inf:  # the default of every class that has it: the DPM solvers, SA
        del config["lambda_min_clipped"]
    for key, value in config.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise CheckpointError(
                f"{file}: {key!r} is {repr(value)[:80]}, a finite number is needed",
                hint="take scheduler_config.json from an intact copy of the checkpoint",
            ) from None
    return architecture(config)
