"""One quantization for every runtime: codes and scales of a component, written tensor by tensor.

Targets pack these codes in their own format, and PyTorch's rounded reference computes with the very same values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from ..export.safetensors_file import read_header, read_tensor
from ..export.weights import Weights
from ..pipeline.artifacts import ComponentSource, StoredTensor
from ..pipeline.stage import Runner
from .cast import to_float16
from .codes import Codes, round_to_nearest
from .low_rank import DOWN, UP, Branch
from .plan import Plan
from .scheme import Scheme, parse_scheme

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


@dataclass(frozen=True)
class QuantizeWeights:
    """Round a component's weights to the codes of `plan`; one tensor is in memory at a time."""

    source: ComponentSource
    plan: Plan

    name: ClassVar[str] = "quantize"
    version: ClassVar[int] = 1
    tools: ClassVar[tuple[str, ...]] = ("numpy",)
    output: ClassVar[type] = QuantizedWeights

    @property
    def precision(self) -> str:
        return self.plan.label

    def key(self) -> Mapping[str, object]:
        return {"component": self.source.component, "source": self.source.digest, "plan": self.plan.key()}

    def run(self, into: Path) -> QuantizedWeights:
        weights = Weights(self.source)
        schemes = {name: self.plan.scheme(name, weights.spec(name)[1]) for name in weights.names()}
        coded = {name: scheme for name, scheme in schemes.items() if not scheme.is_float}
        shapes = {name: weights.spec(name)[1] for name in coded}

        def tensors() -> Iterator[NDArray[Any]]:
            for name, scheme in coded.items():
                yield from tensors_of(round_to_nearest(weights.read(name), scheme, f"{self.source.component}/{name}"))

        write_codes(into / FILE, {name: (shapes[name], coded[name]) for name in coded}, tensors())
        return QuantizedWeights(into, self.source.component)


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


class StoredWeights:
    """The weights of `source` as `plan` stores them. Like `Weights`, it reads one tensor at a time.

    Args:
        quantized: what `quantized_weights` gave for the same source and plan; None for a plan of floats.
    """

    def __init__(self, source: ComponentSource, plan: Plan, quantized: QuantizedWeights | None) -> None:
        if quantized is None and not plan.is_float:
            raise ValueError(f"{source.component} at {plan.label} needs its codes")
        self.component = source.component
        self.plan = plan
        self._weights = Weights(source)
        self._coded = read_header(quantized.file) if quantized else {}
        self.names = self._weights.names
        self.spec = self._weights.spec
        self.check = self._weights.check

    def scheme(self, name: str) -> Scheme:
        """How the parameter is really stored."""
        return self.plan.scheme(name, self._weights.spec(name)[1])

    def is_rounded(self, name: str) -> bool:
        """Whether `read` gives other values than the checkpoint's."""
        if name in self._coded:
            return True
        scheme = self.scheme(name)
        return scheme.weight_bits < 32 and not (scheme.is_half and self._weights.spec(name)[0] == "float16")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape."""
        return {name: self._weights.spec(name)[1] for name in self._weights.names()}

    def codes(self, name: str) -> Codes:
        """Codes and scales of a parameter that is stored as integers."""
        return read_codes(self._coded, name)

    def source_values(self, name: str) -> NDArray[np.float32]:
        """The parameter in float32 before its rounding to float16 or codes."""
        if name in self._coded:
            return read_tensor(self._coded[name])
        return self._weights.read(name).astype(np.float32, copy=False)

    def read(self, name: str) -> NDArray[np.float32]:
        """The parameter in float32 after rounding: the values that a runtime computes with.

        Raises:
            ModelError: a value does not fit float16.
        """
        scheme = self.scheme(name)
        if not scheme.is_float:
            return self.codes(name).dequantised()
        values = self.source_values(name)
        if scheme.is_half:
            return to_float16(values, f"{self.component}/{name}").astype(np.float32)
        return values


class ApartWeights(StoredWeights):
    """As `StoredWeights`, for a graph that has branches as layers of their own: each weight is what its codes say, and
    the factors are parameters `NAME.low_rank.up` [O, rank] and `NAME.low_rank.down` [rank, K] in float16."""

    def __init__(self, source: ComponentSource, plan: Plan, quantized: QuantizedWeights | None) -> None:
        super().__init__(source, plan, quantized)
        self._factors = {name: stored.shape for name, stored in self._coded.items() if name.endswith((UP, DOWN))}
        self.names = self._all_names
        self.spec = self._any_spec
        self.check = self._check_both

    def _all_names(self) -> tuple[str, ...]:
        return (*self._weights.names(), *self._factors)

    def _any_spec(self, name: str) -> tuple[str, tuple[int, ...]]:
        return ("float16", self._factors[name]) if name in self._factors else self._weights.spec(name)

    def _check_both(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        if wrong := [name for name, shape in self._factors.items() if expected.get(name) != shape]:
            raise ValueError(f"the graph has no branch {wrong[0]} of {self._factors[wrong[0]]}")
        self._weights.check({name: shape for name, shape in expected.items() if name not in self._factors})

    def scheme(self, name: str) -> Scheme:
        return parse_scheme("fp16") if name in self._factors else super().scheme(name)

    def read(self, name: str) -> NDArray[np.float32]:
        if name in self._factors:
            return read_tensor(self._coded[name]).astype(np.float32)
        return super().read(name) if self.scheme(name).is_float else self.codes(name).residual()


def quantized_weights(source: ComponentSource, plan: Plan, run: Runner) -> QuantizedWeights | None:
    """The codes of `source` at `plan`, from the cache or fresh; None for a plan of floats."""
    if plan.is_float:
        return None
    if plan.samples is None:
        return run(QuantizeWeights(source, plan))
    from .calibrated import calibrated_weights

    return calibrated_weights(source, plan, plan.samples, run)
