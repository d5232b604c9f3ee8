"""Where each parameter of a PyTorch module lies in an ncnn `.bin` file, learned from fingerprints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from ...stages.errors import ExportError
from ..fingerprints import Fingerprints
from .param import Layer
from .slots import TAG_FP32, Slot, slots_of

PARAMETER: Final = "parameter"  # from the checkpoint
ZEROS: Final = "zeros"  # a bias that ncnn wants and PyTorch does not have
LITERAL: Final = "literal"  # a constant of the graph, such as a causal mask

_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Blob:
    """A slot of the `.bin` file and what goes there. `kind` says which of the fields after it count."""

    slot: Slot
    kind: str
    name: str = ""  # of the parameter
    shape: tuple[int, ...] = ()  # of the parameter in PyTorch
    axes: tuple[int, ...] = ()  # the order in which its axes are written; (0, 1, ...) when it is unchanged
    offset: int = 0  # of the literal in the literals' file, bytes


@dataclass
class Written:
    """A graph in the making: layers, and the contents of their slots."""

    layers: list[Layer] = field(default_factory=list)
    blobs: list[Blob] = field(default_factory=list)

    def emit(self, layer: Layer, *contents: Blob) -> None:
        self.layers.append(layer)
        for slot, content in zip(slots_of([layer]), contents, strict=True):
            self.blobs.append(replace(content, slot=slot))

    def add(self, kind: str, inputs: Sequence[str], *contents: Blob, **params: object) -> str:
        """Emit a layer with one output and return the name of both. Its parameters are written `p0=...`.

        Names are short: there are a dozen new layers for a weight of 4 bits.
        """
        numbered = {int(key[1:]): str(value) for key, value in params.items()}
        name = f"_{len(self.layers)}"
        self.emit(Layer(kind, name, tuple(inputs), (name,), numbered), *contents)
        return name


def learn(layers: Sequence[Layer], weights: Path, fingerprints: Fingerprints, literals: BinaryIO) -> tuple[Blob, ...]:
    """Compare every element of a float32 `.bin` file with the fingerprints, one blob in memory at a time.

    Constants that torch made are copied to `literals`.

    Raises:
        ExportError: a blob is neither a whole parameter nor free of fingerprints, a parameter is nowhere, or
            the file does not end where the graph says.
    """
    blobs = []
    with weights.open("rb") as stream:
        for slot in slots_of(layers):
            if slot.tagged and (tag := stream.read(4)) != TAG_FP32:
                raise ExportError(f"{_place(slot)} starts with the tag {tag.hex() or '(end of file)'}, not float32's")
            patterns = np.fromfile(stream, dtype=np.uint32, count=slot.elements)
            if patterns.size != slot.elements:
                raise ExportError(
                    f"{_place(slot)} has {patterns.size} of {slot.elements} elements: the file ends there"
                )
            blobs.append(_blob(slot, patterns, fingerprints, literals))
        if rest := len(stream.read(4)):
            raise ExportError(f"pnnx wrote weights beyond the last layer ({rest} bytes and more)")
    _check_all_used(blobs, fingerprints)
    return tuple(blobs)


def _blob(slot: Slot, patterns: NDArray[np.uint32], fingerprints: Fingerprints, literals: BinaryIO) -> Blob:
    if found := fingerprints.recognise(patterns):
        name, axes = found
        return Blob(slot, PARAMETER, name, fingerprints.shapes[name], axes)
    if fingerprints.any_in(patterns):
        sample = patterns[:: max(1, patterns.size // 64)]
        owners = sorted({owner for pattern in sample if (owner := fingerprints.owner(int(pattern)))})
        raise ExportError(
            f"{_place(slot)} is no whole parameter; it looks like a mixture of {', '.join(owners[:_SHOWN])}",
            hint="pnnx merged, cut or scaled weights: this version of pnnx is not supported",
        )
    if not patterns.any():
        return Blob(slot, ZEROS)
    offset = literals.tell()
    literals.write(patterns.tobytes())
    return Blob(slot, LITERAL, offset=offset)


def _check_all_used(blobs: Iterable[Blob], fingerprints: Fingerprints) -> None:
    used = {blob.name for blob in blobs}
    if missing := [name for name in fingerprints.shapes if name not in used]:
        raise ExportError(
            f"{len(missing)} of {len(fingerprints.shapes)} parameters are nowhere in the ncnn model: "
            f"{', '.join(missing[:_SHOWN])}",
            hint="pnnx dropped a part of the network: this version of pnnx is not supported",
        )


def _place(slot: Slot) -> str:
    return f"{slot.role} of layer {slot.layer} ({slot.type}, {slot.elements} elements)"


def expected_shapes(blobs: Iterable[Blob]) -> dict[str, tuple[int, ...]]:
    """The parameters that a checkpoint must have, with their shapes."""
    return {blob.name: blob.shape for blob in blobs if blob.kind == PARAMETER}


def is_transposed(blob: Blob) -> bool:
    """Whether a parameter is written in another order than PyTorch's."""
    return blob.axes != tuple(range(len(blob.axes))) and math.prod(blob.shape) > max(blob.shape, default=1)
