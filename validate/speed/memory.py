"""Memory of the process that ran a model, and what lies on disk. One definition, printed with every figure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...stages.errors import BundleError

DEFINITION: Final = (
    "peak resident memory of the model's own process: weights, runtime and Python interpreter together, "
    "file pages that the system could drop again included"
)
"""Other projects print resident minus mapped weights, or the allocator's peak: their figures cannot be compared."""


@dataclass(frozen=True, slots=True)
class Memory:
    """MiB of the process after loading the model, and at its highest over all runs."""

    loaded_mib: float
    peak_mib: float


def bytes_on_disk(files: Iterable[Path]) -> int:
    """What the app has to ship, in bytes; a file named twice counts once.

    Raises:
        BundleError: a file is missing.
    """
    total = 0
    for file in {file.resolve() for file in files}:
        if not file.is_file():
            raise BundleError(f"{file.name} is missing from {file.parent}")
        total += file.stat().st_size
    return total
