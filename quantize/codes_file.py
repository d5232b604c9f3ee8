"""`codes.safetensors`: the integer codes and scales of a component, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.safetensors_file import read_tensor
from ..stages.artifacts import StoredTensor
from .codes import Codes
from .low_rank import DOWN, UP, Branch
from .scheme import Scheme

FILE: Final = "codes.safetensors"
CODES: Final = ".codes"  # int8 [O, ...]
SCALES: Final = ".scales"  # float32 [O, G]


@dataclass(frozen=True, slots=True)
class QuantizedWeights:
    """`codes.safetensors`: `NAME.codes` and `NAME.scales` of each parameter that its plan stores as integers.

    Where its scheme has a branch, `NAME.low_rank.up` and `NAME.low_rank.down` too.

    A parameter under its plain name, float32, stands for a float parameter that a method has changed.
    """

    folder: Path
    component: str
    digest: str = ""

    @property
    def file(self) -> Path:
        return self.folder / FILE


def write_codes(
    file: Path, coded: Mapping[str, tuple[tuple[int, ...], Scheme]], tensors: Iterator[NDArray[Any]]
) -> None:
    """Write `file` as safetensors: for each of `coded` what `tensors_of` gives, as `tensors` yields it."""
    header: dict[str, Any] = {}
    place = 0
    for name, (shape, scheme) in coded.items():
        parts = [(CODES, "I8", shape, 1), (SCALES, "F32", (shape[0], scheme.groups(shape)), 4)]
        if scheme.rank:
            sides = (UP, (shape[0], scheme.rank)), (DOWN, (scheme.rank, prod(shape[1:])))
            parts += [(tag, "F16", side, 2) for tag, side in sides]
        for tag, kind, dims, width in parts:
            end = place + width * prod(dims)
            header[name + tag] = {"dtype": kind, "shape": list(dims), "data_offsets": [place, end]}
            place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, entry), tensor in zip(header.items(), tensors, strict=True):
            if list(tensor.shape) != entry["shape"] or tensor.dtype not in (np.int8, np.float32, np.float16):
                raise ValueError(f"{name} is {tensor.dtype}{list(tensor.shape)}, not {entry}")
            stream.write(np.ascontiguousarray(tensor).data)


def tensors_of(codes: Codes) -> Iterator[NDArray[Any]]:
    """Codes and scales, and the factors of a branch, in the order of the file."""
    yield codes.values
    yield codes.scales
    if codes.branch is not None:
        yield codes.branch.up
        yield codes.branch.down


def read_codes(header: Mapping[str, StoredTensor], name: str) -> Codes:
    """The codes that lie in a file under `name`."""
    branch = Branch(read_tensor(header[name + UP]), read_tensor(header[name + DOWN])) if name + UP in header else None
    return Codes(read_tensor(header[name + CODES]), read_tensor(header[name + SCALES]), branch)
