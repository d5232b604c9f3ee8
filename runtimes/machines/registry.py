"""The machines that `--machine` names."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ...stages.errors import MissingTool, UsageError
from . import arm64
from .machine import Machine
from .vulkan import NAME as VULKAN_NAME
from .vulkan import vulkan

NATIVE: Final = "native"


@dataclass(frozen=True, slots=True)
class Known:
    """A machine, and why it cannot be used on this computer; an empty `problem` means that it can."""

    name: str
    about: str
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "about": self.about, "ready": not self.problem, "problem": self.problem or None}


def machine_named(text: str) -> Machine:
    """The machine that `--machine` names: `arm64`, `arm64:PROCESSOR`, `native` or `vulkan`.

    Raises:
        UsageError: there is none of that name, or this computer cannot be it.
        MissingTool: it is not set up.
    """
    name, _, processor = text.partition(":")
    if name == arm64.NAME:
        return arm64.arm64(processor or arm64.DEFAULT)
    if text == NATIVE:
        if not arm64.is_here():
            raise UsageError(
                f"--machine native needs an AArch64 computer, and this one is {platform.machine()}",
                hint=f"--machine {arm64.NAME} emulates one",
            )
        return Machine(NATIVE)
    if text == VULKAN_NAME:
        return vulkan()
    raise UsageError(f"no machine named {text!r}", hint=f"one of: {', '.join(_names())}")


def machines_named(texts: Sequence[str]) -> tuple[Machine, ...]:
    """Each of them once, in their order."""
    return tuple({machine.name: machine for machine in map(machine_named, texts)}.values())


def _names() -> list[str]:
    return [*(f"{arm64.NAME}:{processor}" for processor in arm64.PROCESSORS), NATIVE, VULKAN_NAME]


def known_machines() -> tuple[Known, ...]:
    """All of them, for people."""
    emulated = [
        Known(f"{arm64.NAME}:{name}", about, _problem(lambda name=name: arm64.arm64(name)))  # type: ignore[misc]
        for name, (_, about) in arm64.PROCESSORS.items()
    ]
    return (
        *emulated,
        Known(NATIVE, "this computer, where it is an AArch64 one", _problem(lambda: machine_named(NATIVE))),
    )


def _problem(use: Callable[[], Machine]) -> str:
    try:
        use()
    except (MissingTool, UsageError) as error:
        return f"{error.what}; {error.hint}"
    return ""
