"""What each layer of ncnn takes. Its wheel is built without its own benchmark, but computes only what it is asked for:
asked for one layer's output after the other, it does one layer's work at a time."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ...stages.artifacts import TargetModel
from ...stages.errors import ToolCrashed
from ..checks import checked_feeds, checked_results
from ..op_times import OpTime, OpTimes, median_ms
from ..protocol import Array, Feeds
from .param import Layer, parse
from .session import open_net

_INPUT = "Input"


def time_ops(model: TargetModel, feeds: Feeds, *, threads: int, runs: int) -> OpTimes:
    """As `OpTimed.time_ops`. The time of a layer includes handing its output over in the plain layout."""
    layers = [layer for layer in parse((model.folder / model.files[0]).read_text()) if layer.type != _INPUT]
    checked = checked_feeds(feeds, model.inputs, f"ncnn {model.component}")
    net = open_net(model, threads)
    try:
        rounds = [_run(net, layers, checked, model) for _ in range(1 + runs)]
    finally:
        net.clear()
    taken = median_ms([seconds for seconds, _ in rounds[1:]])
    ops = tuple(OpTime(layer.name, layer.type, ms, layer.outputs[0]) for layer, ms in zip(layers, taken, strict=True))
    return OpTimes(ops, rounds[0][1])


def _run(net: Any, layers: list[Layer], feeds: Feeds, model: TargetModel) -> tuple[list[float], dict[str, Array]]:
    """Seconds of each layer, and the model's outputs."""
    import ncnn

    extractor = net.create_extractor()  # in light mode: a blob is freed when the layer that reads it has run
    wanted = {spec.name for spec in model.outputs}
    seconds, results = [], {}
    for name, array in feeds.items():
        extractor.input(name, ncnn.Mat(np.ascontiguousarray(array[0])).clone())
    for layer in layers:
        started = time.perf_counter()
        for blob in layer.outputs:
            status, mat = extractor.extract(blob)
            if status:
                raise ToolCrashed(f"ncnn {model.component} gave no {blob} (status {status})", hint="is memory short?")
            if blob in wanted:
                results[blob] = np.array(mat)[None]
            del mat  # a blob that is held here too cannot be worked on in place
        seconds.append(time.perf_counter() - started)
    return seconds, checked_results(results, model.outputs, f"ncnn {model.component}")
