"""The `pnnx` program: TorchScript -> ncnn.

It is called as a program, not through its Python module: that one discards the log and the exit status. And the status
is not enough: pnnx leaves out what it cannot express, says so in its log, and exits with 0.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ...stages.artifacts import TensorSpec
from ...stages.errors import ExportError, MissingTool, NoRoom, ToolCrashed
from ...stages.failures import MORE_MEMORY
from ...stages.limits import ran_out_of_memory
from .param import parse

_TYPES: Final = {"float32": "f32", "int32": "i32", "int64": "i64"}
_REFUSED: Final = ("ignore ", "todo ", "unknown ", "unsupported ")  # starts of lines that tell of something left out
_TAIL: Final = 20  # lines of a dead tool's log that are shown


def program() -> Path:
    """Where the pnnx package keeps its executable.

    Raises:
        MissingTool: it is not installed.
    """
    spec = importlib.util.find_spec("pnnx")
    found = shutil.which("pnnx", path=str(Path(spec.origin).parent)) if spec and spec.origin else None
    if found is None:
        raise MissingTool("building for 'ncnn' needs the program pnnx", hint="pip install 'diffusette[convert]'")
    return Path(found)


def convert(script: Path, inputs: Sequence[Sequence[TensorSpec]], into: Path) -> tuple[Path, Path]:
    """Convert a TorchScript file; weights stay float32.

    pnnx runs the model to learn every shape, and holds all activations at that moment.

    Args:
        script: from `torch.jit.trace`.
        inputs: one set of inputs, or two; shapes that differ between two become expressions in the graph.
        into: a folder that is writable and private.
    Returns:
        The `.param` and the `.bin` file, in `into`.
    Raises:
        ExportError: the log tells of something that was left out, or ncnn does not know a layer.
        ToolCrashed, NoRoom: pnnx ended with a signal or a failure status.
    """
    param, weights, log = into / "pnnx.param", into / "pnnx.bin", into / "pnnx.log"
    shapes = [f"{key}={_shapes(specs)}" for key, specs in zip(("inputshape", "inputshape2"), inputs, strict=False)]
    outputs = [f"ncnnparam={param}", f"ncnnbin={weights}"]
    unwanted = [f"{name}={os.devnull}" for name in ("pnnxparam", "pnnxbin", "pnnxpy", "pnnxonnx", "ncnnpy")]
    argv: list[str | Path] = [program(), script, *shapes, "fp16=0", *outputs, *unwanted]
    with log.open("wb") as output:
        status = subprocess.run(argv, cwd=into, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    check_log(log.read_text(errors="replace"), status)
    check_layers(param)
    return param, weights


def _shapes(specs: Sequence[TensorSpec]) -> str:
    return ",".join(f"[{','.join(map(str, spec.shape))}]{_TYPES[spec.dtype]}" for spec in specs)


def check_log(log: str, status: int) -> None:
    """Refuse a failure status, and a success that the log contradicts."""
    lines = log.splitlines()
    tail = "\n".join(f"  | {line[:200]}" for line in lines[-_TAIL:]) or "  | (it printed nothing)"
    if status == -signal.SIGKILL:
        raise NoRoom(
            f"pnnx was killed (signal 9); its last lines:\n{tail}",
            hint="most often the system ran out of memory: `diffusette inspect` forecasts what a conversion needs",
        )
    if status and ran_out_of_memory(tail):
        raise NoRoom(f"pnnx was given no more memory; its last lines:\n{tail}", hint=MORE_MEMORY)
    if status:
        how = f"crashed with {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise ToolCrashed(f"pnnx {how}; its last lines:\n{tail}", hint="please report this with these lines")
    if left_out := [line for line in lines if line.startswith(_REFUSED)]:
        shown = "\n".join(f"  | {line[:200]}" for line in left_out[:_TAIL])
        raise ExportError(
            f"pnnx left out {len(left_out)} things that the model needs:\n{shown}",
            hint="ncnn cannot run this architecture as it is: convert it with --target ort or mnn",
        )


def check_layers(param: Path) -> None:
    """Let ncnn read a `.param` file, in a process of its own; refuse layers that it does not know.

    Raises:
        ExportError: ncnn refuses the graph, with what it printed.
    """
    layers = parse(param.read_text(), param.name)
    argv = [sys.executable, "-m", f"{__package__}.probe", str(param)]
    probe = subprocess.run(argv, capture_output=True, text=True, check=False)
    if probe.returncode:
        said = "\n".join(f"  | {line}" for line in (probe.stdout + probe.stderr).splitlines()[-_TAIL:])
        raise ExportError(
            f"ncnn refuses the graph of {len(layers)} layers that pnnx wrote (status {probe.returncode}):\n{said}",
            hint="ncnn cannot run this architecture as it is: convert it with --target ort or mnn",
        )
