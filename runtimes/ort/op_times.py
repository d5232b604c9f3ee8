"""What each kernel of ONNX Runtime takes, by its own profiler."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Final

from ...stages.artifacts import TargetModel
from ...stages.errors import ToolCrashed
from ...stages.onnx_file import read_onnx
from ..op_times import OpTime, OpTimes, median_ms
from ..protocol import Feeds
from .session import OrtSession

_KERNEL: Final = "_kernel_time"
# What the optimiser appends to the name of a node or of what it makes; where it fuses several, of one of them.
_LAID_OUT: Final = "_nchwc"
_FUSED: Final = "/"


def time_ops(model: TargetModel, feeds: Feeds, *, threads: int, runs: int) -> OpTimes:
    """As `OpTimed.time_ops`. Kernels that the optimiser put in, to change layouts, belong to no module."""
    file = model.folder / model.files[0]
    nodes = read_onnx(file).nodes if file.suffix == ".onnx" else ()
    modules = {name: node.module for node in nodes for name in (node.name, *node.outputs)}
    with (
        tempfile.TemporaryDirectory(prefix="ort.") as folder,
        OrtSession(model, threads, str(Path(folder, "kernels"))) as session,
    ):
        for _ in range(1 + runs):
            results = session.run(feeds)
        events = json.loads(session.end_profiling().read_text())
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_KERNEL)]
    rounds = _rounds(kernels, 1 + runs, model.component)
    taken = median_ms([[event["dur"] / 1e6 for event in each] for each in rounds[1:]])  # microseconds
    ops = []
    for event, ms in zip(rounds[0], taken, strict=True):
        name = event["name"].removesuffix(_KERNEL)
        node = name.partition(_FUSED)[0].removesuffix(_LAID_OUT)
        ops.append(OpTime(name, event["args"]["op_name"], ms, module=modules.get(node, "")))
    return OpTimes(tuple(ops), results)


def _rounds(kernels: list[Any], count: int, component: str) -> list[list[Any]]:
    """Split the kernels into runs: they are executed one after the other, in the same order every time."""
    each = len(kernels) // count
    rounds = [kernels[start * each : (start + 1) * each] for start in range(count)]
    names = [[event["name"] for event in each] for each in rounds]
    if each * count != len(kernels) or any(found != names[0] for found in names):
        raise ToolCrashed(f"ort {component} ran {len(kernels)} kernels in {count} runs, not the same ones in each")
    return rounds
