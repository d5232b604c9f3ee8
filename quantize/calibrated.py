"""Codes by GPTQ along calibration samples, as stages: a chunk of layers each, so that memory and lost work are bounded.

Peak memory: the component in float32 with the moments of one chunk (`moments.CHUNK_BYTES` at most), and after that the
chunk's layers with the work on one of them. A row too long for one matrix of moments is cut; see `moments`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.safetensors_file import read_header, read_tensor
from ..checkpoints.weights import Weights
from ..stages.artifacts import ComponentSource, StoredTensor
from ..stages.errors import ModelError
from ..stages.stage import Runner, Stage
from .codes import Codes, round_to_nearest
from .codes_file import CODES, FILE, SCALES, QuantizedWeights, read_codes, tensors_of, write_codes
from .low_rank import DOWN, UP
from .plan import EMBEDDING, Plan
from .samples import Samples
from .scheme import Scheme, parse_scheme

if TYPE_CHECKING:
    from torch import nn

ERRORS: Final = ".errors"  # float32 [O]: E|D x|^2 of each output channel
LAYERS: Final = "layers.safetensors"


@dataclass(frozen=True, slots=True)
class RoundedLayers:
    """`layers.safetensors`: `PARAMETER@SCHEME` with `.codes`, `.scales`, factors of a branch and `.errors`, for each
    layer and scheme.

    Without codes (`row_errors`), the errors are those of rounding to the nearest.
    """

    folder: Path
    component: str
    parameters: tuple[str, ...]
    schemes: tuple[str, ...]
    digest: str = ""

    def header(self) -> dict[str, StoredTensor]:
        """Where each tensor lies; nothing is read yet."""
        return read_header(self.folder / LAYERS)


@dataclass(frozen=True)
class RoundLayers(
    Stage[RoundedLayers],
    name="round",
    version=2,
    tools=("torch", "diffusers", "transformers", "numpy"),
    aside=("form",),
):
    """Round some layers of a component to what changes their output least along the samples.

    At each of `schemes`; with `own`, every layer at its own of them.
    """

    source: ComponentSource
    samples: Samples
    layers: tuple[str, ...]  # paths of modules
    schemes: tuple[str, ...]
    own: tuple[str, ...] = ()  # of each layer, in their order
    form: str = ""  # which chunk of how many, for people

    def run(self, into: Path) -> RoundedLayers:
        from safetensors.numpy import save_file

        from ..export import modules
        from .gptq import round_by_output
        from .moments import measure_moments, weighted_modules

        wrapped = modules.load(self.source)
        found = weighted_modules(bare(wrapped))
        if strange := [path for path in self.layers if path not in found]:
            raise ModelError(f"{self.source.component}: {strange[0]} is neither a linear layer nor a convolution")
        layers = {path: found[path] for path in self.layers}
        moments = measure_moments(wrapped, layers, self.samples.feeds(self.source.component))
        del wrapped, found
        gc.collect()  # modules hold reference cycles; from here on only these layers are in memory
        tensors: dict[str, NDArray[Any]] = {}
        own = dict(zip(self.layers, self.own, strict=True)) if self.own else {}
        for path, layer in layers.items():
            parameter = f"{path}.weight"
            weight = layer.weight.numpy()  # type: ignore[operator]
            schemes = stored_schemes(parameter, weight.shape, (own[path],) if own else self.schemes)
            name = f"{self.source.component}/{parameter}"
            for scheme, rounded in round_by_output(weight, moments.pop(path), schemes, name).items():
                tensors[f"{parameter}@{scheme}{CODES}"] = rounded.codes.values
                tensors[f"{parameter}@{scheme}{SCALES}"] = rounded.codes.scales
                if rounded.codes.branch is not None:
                    tensors[f"{parameter}@{scheme}{UP}"] = rounded.codes.branch.up
                    tensors[f"{parameter}@{scheme}{DOWN}"] = rounded.codes.branch.down
                tensors[f"{parameter}@{scheme}{ERRORS}"] = rounded.errors.astype(np.float32)
        save_file(tensors, into / LAYERS)
        return RoundedLayers(into, self.source.component, tuple(f"{path}.weight" for path in layers), self.schemes)


@dataclass(frozen=True)
class PickCodes(Stage[QuantizedWeights], name="quantize", version=1, tools=("numpy",)):
    """Of each layer, the codes of the scheme that the plan gives it; token embeddings are rounded to the nearest."""

    source: ComponentSource
    plan: Plan
    rounded: tuple[RoundedLayers, ...]

    def run(self, into: Path) -> QuantizedWeights:
        weights = Weights(self.source)
        picker = CodePicker(self.source, self.rounded)
        coded: dict[str, tuple[tuple[int, ...], Scheme]] = {}
        for name in weights.names():
            shape = weights.spec(name)[1]
            scheme = self.plan.scheme(name, shape)
            if not scheme.is_float:
                coded[name] = (shape, scheme)

        def tensors() -> Iterator[NDArray[Any]]:
            for name, (_, scheme) in coded.items():
                yield from tensors_of(picker.codes(name, scheme))

        write_codes(into / FILE, coded, tensors())
        return QuantizedWeights(into, self.source.component)


class CodePicker:
    """Codes of any parameter at any scheme that its layer was rounded at; one tensor is read at a time."""

    def __init__(self, source: ComponentSource, rounded: tuple[RoundedLayers, ...]) -> None:
        self._weights = Weights(source)
        self._component = source.component
        self._layers = {parameter: each for each in rounded for parameter in each.parameters}
        self._headers = {each.digest: each.header() for each in rounded}

    def names(self) -> tuple[str, ...]:
        """Every parameter of the component."""
        return self._weights.names()

    def codes(self, parameter: str, scheme: Scheme) -> Codes:
        """By GPTQ where `parameter` was rounded so, else to the nearest."""
        header = self._headers[self._layers[parameter].digest] if parameter in self._layers else {}
        name = f"{parameter}@{scheme.name}"
        if name + CODES not in header:
            return round_to_nearest(self._weights.read(parameter), scheme, f"{self._component}/{parameter}")
        return read_codes(header, name)

    def errors(self, parameter: str, scheme: Scheme) -> NDArray[np.float64]:
        """E|D x|^2 of each output channel of a layer at `scheme`: [O]."""
        header = self._headers[self._layers[parameter].digest]
        return read_tensor(header[f"{parameter}@{scheme.name}{ERRORS}"]).astype(np.float64)

    def is_layer(self, parameter: str) -> bool:
        """Whether `parameter` belongs to a linear layer or convolution, so that its output error is known."""
        return parameter in self._layers


def round_layers(
    source: ComponentSource,
    samples: Samples,
    schemes: tuple[str, ...],
    run: Runner,
    own: Mapping[str, str] | None = None,
) -> tuple[RoundedLayers, ...]:
    """All layers of a component at each of `schemes`, chunk by chunk, from the cache or fresh.

    Args:
        own: path -> the one of `schemes` to round a layer at; layers that it lacks are not rounded.
    """
    from .moments import chunks_of

    shapes = layer_shapes(source)
    if own is not None:
        shapes = {path: shape for path, shape in shapes.items() if path in own}
    chunks = chunks_of(shapes)
    return tuple(
        run(
            RoundLayers(
                source,
                samples,
                chunk,
                schemes,
                own=tuple(own[path] for path in chunk) if own is not None else (),
                form=f"{number}/{len(chunks)}" if len(chunks) > 1 else "",
            )
        )
        for number, chunk in enumerate(chunks, start=1)
    )


def calibrated_weights(source: ComponentSource, plan: Plan, samples: Samples, run: Runner) -> QuantizedWeights:
    """The codes of `source` at `plan`, rounded by output error."""
    if plan.rounded_with and not plan.channels:  # a search has them at hand, with groups in the order of memory
        return run(PickCodes(source, plan, round_layers(source, samples, plan.rounded_with, run)))
    schemes = {path: plan.scheme(f"{path}.weight", shape) for path, shape in layer_shapes(source).items()}
    own = {path: scheme.name for path, scheme in schemes.items() if not scheme.is_float}
    return run(PickCodes(source, plan, round_layers(source, samples, tuple(sorted(set(own.values()))), run, own)))


def layer_shapes(source: ComponentSource) -> dict[str, tuple[int, ...]]:
    """Module path -> shape of the weight, for every linear layer and convolution of a component, from headers alone."""
    weights = Weights(source)
    shapes = {name: weights.spec(name)[1] for name in weights.names()}
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if len(shape) > 1 and name.endswith(".weight") and not EMBEDDING.search(name)
    }


def stored_schemes(parameter: str, shape: tuple[int, ...], schemes: tuple[str, ...]) -> tuple[Scheme, ...]:
    """What `schemes` really become for this parameter, each once: a short row cannot have groups."""
    found = {Plan(name).scheme(parameter, shape).name: None for name in schemes}
    return tuple(parse_scheme(name) for name in found if not parse_scheme(name).is_float)


def bare(wrapped: nn.Module) -> nn.Module:
    """The diffusers or transformers module inside a component's wrapper, whose names the weights have."""
    module: nn.Module = wrapped.m  # type: ignore[assignment]
    return module
