"""A session that doubles its input, or misbehaves as it is told. Child processes import it by name."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
from diffusette.stages.artifacts import TensorSpec
from diffusette.stages.errors import ModelError


class Doubler:
    inputs = (TensorSpec("x", "float32", (2, 3)),)
    outputs = (TensorSpec("y", "float32", (2, 3)),)

    def __init__(self, how: str) -> None:
        self.how = how

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        if self.how == "crash":
            os.write(2, b"about to fall\n")
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.how == "refuse":
            raise ModelError("no", hint="ask again")
        if self.how == "greedy":
            np.empty(2**62, np.uint8)
        if self.how == "hang":
            os.read(os.pipe()[0], 1)
        if self.how == "broken weights":
            return {"y": np.full((2, 3), 3.4e38, np.float32)}
        if self.how == "other shape":
            return {"y": np.zeros((3, 2), np.float32)}
        return {"y": feeds["x"] * 2}


def open_doubler(argument: Any, threads: int) -> Doubler:
    if argument["how"] == "crash on load":
        os.kill(os.getpid(), signal.SIGABRT)
    if argument["how"] == "greedy on load":
        raise MemoryError
    return Doubler(argument["how"])
