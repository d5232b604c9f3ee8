"""The environment of child processes: offline, and with temporary files in a folder of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

# A stage's threads sleep while they wait: by default they spin, which on a machine that is busy with other work
# takes the very cores that the threads they wait for would need.
_PATIENT: Final = {"OMP_WAIT_POLICY": "PASSIVE"}
_OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def patient_environment(temporary: Path) -> dict[str, str]:
    """`child_environment` for work that is not timed."""
    return {**_PATIENT, **child_environment(temporary)}


def child_environment(temporary: Path) -> dict[str, str]:
    """This process's environment, offline, with temporary files in `temporary`."""
    return {**os.environ, **_OFFLINE, "TMPDIR": str(temporary), "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}
