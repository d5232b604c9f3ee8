"""Where a model's time goes: each operation of a runtime's own graph, timed by the runtime or around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol, runtime_checkable

from ..stages.artifacts import TargetModel
from .protocol import Array, Feeds


@dataclass(frozen=True, slots=True)
class OpTime:
    """One operation, in milliseconds: the median of its runs. Names and kinds are the runtime's own."""

    name: str
    op: str
    ms: float
    tensor: str = ""  # what it makes, by the name that the model's file has for it; empty for the runtime's own work
    module: str = ""  # PyTorch's path, where the model says it


@dataclass(frozen=True, slots=True)
class OpTimes:
    """All operations that ran, in the order of their execution, and what the model computed meanwhile."""

    ops: tuple[OpTime, ...]
    results: Mapping[str, Array]


@runtime_checkable
class OpTimed(Protocol):
    """A target that can say what each operation takes. `profile --ops` needs it; nothing else does."""

    def time_ops(self, model: TargetModel, feeds: Feeds, *, threads: int, runs: int) -> OpTimes:
        """Run `model` once to warm up and `runs` times timed, in this process.

        Raises:
            ModelError, BundleError: the model cannot be loaded.
            ToolCrashed: the runtime failed, or ran other operations from one run to the next.
        """
        ...


def median_ms(runs: Sequence[Iterable[float]]) -> list[float]:
    """Seconds of the same operations in several runs -> the median of each, in milliseconds."""
    return [1e3 * median(seconds) for seconds in zip(*runs, strict=True)]
