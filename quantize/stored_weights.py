"""A component's weights as its plan stores them: for the packers of runtimes, and for PyTorch's reference."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.safetensors_file import read_header, read_tensor
from ..checkpoints.weights import Weights
from ..stages.artifacts import ComponentSource
from .cast import to_float16
from .codes import Codes
from .codes_file import QuantizedWeights, read_codes
from .low_rank import DOWN, UP
from .plan import Plan
from .scheme import Scheme, parse_scheme


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
