"""In what numbers a runtime computes, and the options of its own by which an app chooses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from ..stages.artifacts import TargetModel
from ..stages.errors import UsageError, refuse_unknown

FLOAT32: Final = "float32"
"""The name of the arithmetic in which every target is proven first: numbers, products and sums in float32."""

PROVEN: Final = ""
"""In place of a name: the arithmetic that the target proves a model in, `Target.proven_in(model)`."""

PROBE_ROWS: Final = 64
"""Rows of the matrix that a target's probe multiplies: enough for a runtime to use the kernels that models use."""

Device = Literal["cpu", "vulkan"]
CPU: Final[Device] = "cpu"
VULKAN: Final[Device] = "vulkan"

Computed = Literal["float32", "float16 stored", "float16", "bfloat16 stored", "bfloat16", "other"]
"""What a probe finds: in what numbers results are kept between layers ("stored"), and in what they are added up."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """One way to open a model. `options` are the runtime's own words, for an app's developer to copy.

    Args:
        name: how `--arithmetic`, the manifest and tables call it.
        options: name of the option in the runtime's API -> value; an option that is absent keeps the runtime's default.
        expects: what a processor with the needed instructions computes under it.
        is_default: an app that sets no option gets this one on AArch64.
        device: what computes: the processor, or a GPU by Vulkan.
        rank: place in the order in which a phone is expected to be fast with it, 1 first. A judgement from what
            moves through memory and through the units of arithmetic; an emulator cannot time it.
    """

    name: str
    options: Mapping[str, Any]
    expects: Computed
    is_default: bool = False
    device: Device = CPU
    rank: int = 9


@dataclass(frozen=True, slots=True)
class Opening:
    """What a child process is told to load: a model, and in which arithmetic. Plain values only."""

    model: TargetModel
    arithmetic: str = PROVEN

    @property
    def target(self) -> str:
        return self.model.target

    @property
    def component(self) -> str:
        return self.model.component


def arithmetic_named(name: str, known: Sequence[Arithmetic], target: str) -> Arithmetic:
    """The arithmetic of that name.

    Raises:
        UsageError: the target has none of that name; names those that it has.
    """
    names = [each.name for each in known]
    refuse_unknown([name], names, f"arithmetic of {target}", UsageError)
    return known[names.index(name)]
