"""A Vulkan device: this computer's GPU, or Mesa's lavapipe, which is software that stands in for one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from ...stages.errors import MissingTool
from ..arithmetic import VULKAN
from .machine import Machine

NAME: Final = "vulkan"
_DRIVERS: Final = (Path("/usr/share/vulkan/icd.d"), Path("/etc/vulkan/icd.d"))
_CHOSEN: Final = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES")  # of the Vulkan loader, newest name first


def vulkan() -> Machine:
    """The machine whose models run by Vulkan.

    Raises:
        MissingTool: no Vulkan driver is installed.
    """
    if not any(os.environ.get(name) for name in _CHOSEN) and not any(drivers()):
        raise MissingTool(
            "no Vulkan driver is installed",
            hint="apt-get install mesa-vulkan-drivers libvulkan1 brings one that needs no GPU",
        )
    return Machine(NAME, device=VULKAN)


def drivers() -> list[str]:
    """Names of the drivers that the Vulkan loader finds."""
    return sorted(file.name for folder in _DRIVERS for file in folder.glob("*.json"))
