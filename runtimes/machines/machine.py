"""Where a model runs: this computer, or another processor that is played on it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from ..arithmetic import CPU, Device


@dataclass(frozen=True, slots=True)
class Machine:
    """A way to start a Python whose native code is another processor's.

    `isolation.open_isolated` starts its child with `python`; everything else of a session stays as it is.

    Args:
        name: as `--machine` takes it: "arm64:cortex-a76", "native", "vulkan".
        python: the beginning of a command line that starts Python there.
        environment: variables that the child gets besides; an empty value takes one away.
        device: which of its devices computes.
    """

    name: str
    python: tuple[str, ...] = (sys.executable,)
    environment: Mapping[str, str] = field(default_factory=dict)
    device: Device = CPU

    def environment_of(self, base: Mapping[str, str]) -> dict[str, str]:
        """`base` with this machine's variables."""
        merged = {**base, **self.environment}
        return {name: value for name, value in merged.items() if value}


HERE: Final = Machine("here")
"""This process's own interpreter."""
