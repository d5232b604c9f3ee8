"""A stage that does what it is told. It is a module of its own because child processes import it by name."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from diffusette.stages.errors import ModelError
from diffusette.stages.stage import Stage


class OddModel(ModelError):
    """An error that a target of another package might raise."""


@dataclass(frozen=True)
class Written:
    folder: Path
    words: int
    digest: str = ""


@dataclass(frozen=True)
class Write(Stage[Written], name="write", version=1, tools=("numpy",), aside=("log",)):
    """A stage that does what `text` tells it."""

    text: str
    log: Path  # not part of the key: where runs are counted

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
        if self.text == "greedy":
            bytearray(2**40)
        if self.text == "greedy native code":
            os.write(1, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
            os.abort()
        if self.text == "busy for ever":
            while True:
                pass
        if self.text == "slow":
            time.sleep(60)
        if self.text == "big":
            block = bytearray(os.urandom(1 << 20) * 200)
            time.sleep(0.5)
            assert block
        (into / "text.txt").write_text(self.text)
        return Written(into, len(self.text.split()))


@dataclass(frozen=True)
class Circumstances:
    """What a process knows of itself."""

    folder: Path
    pid: int
    parent: int
    torch: bool  # imported before the stage began
    word: str
    temporary: str
    cwd: str
    digest: str = ""


@dataclass(frozen=True)
class Imitate(Stage[Circumstances], name="imitate", version=1, tools=("torch",), aside=("note",)):
    """A stage that says that it needs torch, and does what `what` tells it."""

    what: str
    number: int
    note: str = ""  # a file to write process ids to

    def run(self, into: Path) -> Circumstances:
        if self.what == "error":
            raise ModelError("as told")
        if self.what == "abort":
            os.write(1, b"last words\n")
            os.abort()
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "kill the server":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        if self.what == "sleep":
            Path(self.note).write_text(f"{os.getppid()} {os.getpid()}")
            time.sleep(60)
        return Circumstances(
            into,
            os.getpid(),
            os.getppid(),
            "torch" in sys.modules,
            os.environ.get("DIFFUSETTE_TEST_WORD", ""),
            tempfile.gettempdir(),
            str(Path.cwd()),
        )
