"""A stage that does what it is told. It is a module of its own because child processes import it by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from diffusette.pipeline.errors import ModelError


class OddModel(ModelError):
    """An error that a target of another package might raise."""


@dataclass(frozen=True)
class Written:
    folder: Path
    words: int
    digest: str = ""


@dataclass(frozen=True)
class Write:
    """A stage that does what `text` tells it."""

    text: str
    log: Path  # not part of the key: where runs are counted

    name: ClassVar[str] = "write"
    version: ClassVar[int] = 1
    tools: ClassVar[tuple[str, ...]] = ("numpy",)
    output: ClassVar[type] = Written

    def key(self) -> Mapping[str, object]:
        return {"text": self.text}

    def run(self, into: Path) -> Written:
        with self.log.open("a") as log:
            log.write("x")
        (into / "half.txt").write_text("half")
        if self.text == "raise":
            raise ModelError("the model is wrong", hint="take another")
        if self.text == "odd":
            raise OddModel("an odd model", hint="take an even one")
        if self.text == "absent":
            (self.log.parent / "absent.safetensors").read_bytes()
        if self.text == "our own absent":
            (into / "absent.bin").read_bytes()
        if self.text == "bug":
            raise ZeroDivisionError("ours")
        if self.text == "segfault":
            os.write(1, b"last words\n")
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.text == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.text == "full":
            raise OSError(28, "No space left on device", "big.bin")
        if self.text == "slow":
            time.sleep(60)
        if self.text == "big":
            block = bytearray(os.urandom(1 << 20) * 200)
            time.sleep(0.5)
            assert block
        (into / "text.txt").write_text(self.text)
        return Written(into, len(self.text.split()))
