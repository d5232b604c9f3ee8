"""What each operation of MNN takes, by the callbacks of its older interface: the one for modules has none."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ...stages.artifacts import TargetModel
from ...stages.errors import ModelError, ToolCrashed
from ..checks import checked_feeds, checked_results
from ..op_times import OpTime, OpTimes, median_ms
from ..protocol import Array, Feeds
from .arithmetic import configuration, proven_in
from .mnn_file import MnnFile


def time_ops(model: TargetModel, feeds: Feeds, *, threads: int, runs: int) -> OpTimes:
    """As `OpTimed.time_ops`. MNN runs operations of its own making (Raster: a copy into another layout)."""
    file = MnnFile(model.folder / model.files[0])
    file.check_weights()
    checked = checked_feeds(feeds, model.inputs, f"mnn {model.component}")
    net, session = _open(file, threads, proven_in(model))
    rounds = [_run(net, session, checked, model.component) for _ in range(1 + runs)]
    names = [[(name, op) for name, op, _ in each] for each in rounds]
    if any(found != names[0] for found in names):
        raise ToolCrashed(f"mnn {model.component} ran other operations from one run to the next")
    taken = median_ms([[seconds for _, _, seconds in each] for each in rounds[1:]])
    tensors = {op.name: op.outputs[0] for op in file.wires() if op.outputs}
    ops = tuple(OpTime(name, op, ms, tensors.get(name, "")) for (name, op), ms in zip(names[0], taken, strict=True))
    results = {spec.name: _read(net, session, spec.name) for spec in model.outputs}
    return OpTimes(ops, checked_results(results, model.outputs, f"mnn {model.component}"))


def _open(file: MnnFile, threads: int, arithmetic: str) -> tuple[Any, Any]:
    """Configured as `session.new_runtime` configures modules, so that the same kernels run."""
    import MNN

    try:
        net = MNN.Interpreter(str(file.path))
    except Exception as error:  # MNN raises bare Exception
        raise ModelError(f"MNN cannot load {file.path}: {error}", hint="fetch or convert it again") from error
    if file.weight_bytes:
        net.setExternalFile(str(file.weight_file))
    config, hints = configuration(arithmetic, threads)
    for hint, value in hints.items():
        net.setSessionHint(hint, value)
    session = net.createSession(config)
    return net, session


def _fill(net: Any, session: Any, name: str, value: Array) -> None:
    import MNN

    kind = {"float32": MNN.Halide_Type_Float, "int32": MNN.Halide_Type_Int}[value.dtype.name]
    host = MNN.Tensor(value.shape, kind, np.ascontiguousarray(value), MNN.Tensor_DimensionType_Caffe)
    if not net.getSessionInput(session, name).copyFrom(host):
        raise ToolCrashed(f"mnn does not take {name}")


def _read(net: Any, session: Any, name: str) -> Array:
    import MNN

    tensor = net.getSessionOutput(session, name)
    shape = tensor.getShape()
    empty = np.zeros(shape, np.float32)
    host = MNN.Tensor(shape, MNN.Halide_Type_Float, empty, MNN.Tensor_DimensionType_Caffe)
    tensor.copyToHostTensor(host)
    return np.array(host.getNumpyData(), np.float32).reshape(shape)


def _run(net: Any, session: Any, feeds: Feeds, component: str) -> list[tuple[str, str, float]]:
    """Name, kind and seconds of each operation."""
    for name, value in feeds.items():  # again for each run: what it computes lies in the memory of its inputs
        _fill(net, session, name, value)
    found: list[tuple[str, str, float]] = []
    started = 0.0

    def before(_tensors: Any, _op: Any) -> bool:
        nonlocal started
        started = time.perf_counter()
        return True

    def after(_tensors: Any, op: Any) -> bool:
        found.append((op.getName(), op.getType(), time.perf_counter() - started))
        return True

    if status := net.runSessionWithCallBackInfo(session, before, after):
        raise ToolCrashed(f"mnn {component} failed (status {status})", hint="is memory short?")
    return found
