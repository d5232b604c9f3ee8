"""Faults planted in built models: what a converter, a copy or an update of a runtime might do to one module.

Weights are found in a model's files by their bytes, so one way of planting serves all targets: in any of their
layouts a parameter is there as float16 or float32, as PyTorch has it or transposed.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from diffusette.pipeline.artifacts import ComponentSource, TargetModel
from diffusette.quantize.plan import Plan
from diffusette.quantize.quantized import StoredWeights
from diffusette.runtimes.mnn.mnn_file import MnnFile, _slot
from diffusette.runtimes.taps import Wiring
from numpy.typing import NDArray

Array = NDArray[Any]
WRONG_EPSILON: Final = 0.05
_LAYER_NORM: Final = 603  # MNN's OpType, of group normalisation too
_EPSILON_FIELD: Final = 1  # MNN's schema, table LayerNorm


@dataclass(frozen=True)
class Fault:
    """What happens to which module of which component."""

    kind: str
    component: str
    module: str

    def __str__(self) -> str:
        return f"{self.kind} {self.component}/{self.module}"


def scaled_weight(weight: Array) -> Array:
    return weight * np.float32(1.1)


def swapped_channels(weight: Array) -> Array:
    """The first two and the last two output channels change places."""
    order = np.arange(len(weight))
    order[[0, 1, -2, -1]] = order[[1, 0, -1, -2]]
    return weight[order]


def dropped(vector: Array) -> Array:
    """A bias that is gone."""
    return np.zeros_like(vector)


def lost_scale(vector: Array) -> Array:
    """A scale that is gone: one for every channel."""
    return np.ones_like(vector)


def overflowed(weight: Array) -> Array:
    """One weight that did not fit float16."""
    damaged = weight.copy()
    damaged.flat[damaged.size // 2] = np.inf
    return damaged


def rotated_heads(weight: Array) -> Array:
    """Rows of one attention head where another head expects its own; every Stable Diffusion has 2 heads or more."""
    return np.roll(weight, len(weight) // 4, axis=0)


EDITS: Final[dict[str, tuple[str, Callable[[Array], Array]]]] = {
    "scaled weight": ("weight", scaled_weight),
    "swapped channels": ("weight", swapped_channels),
    "dropped bias": ("bias", dropped),
    "lost scale": ("weight", lost_scale),
    "fp16 overflow": ("weight", overflowed),
    "rotated heads": ("weight", rotated_heads),
}
"""Kind -> the parameter, and what becomes of it. Further kinds: "wrong epsilon", and "swapped q and k"."""


def plant(fault: Fault, model: TargetModel, source: ComponentSource, wiring: Wiring) -> None:
    """Damage the files of `model` in place.

    Raises:
        LookupError: the fault has no place in them.
    """
    files = [model.folder / file for file in model.files]
    stored = StoredWeights(source, Plan("fp16"), None)
    if fault.kind == "wrong epsilon":
        _change_epsilon(model, files, fault.module, stored, wiring)
    elif fault.kind == "swapped q and k":
        query, key = (stored.read(f"{fault.module}.{name}.weight") for name in ("to_q", "to_k"))
        of_query, of_key = _places(files, query), _places(files, key)
        _write(files, of_query, key)
        _write(files, of_key, query)
    else:
        leaf, edit = EDITS[fault.kind]
        value = stored.read(f"{fault.module}.{leaf}")
        _write(files, _places(files, value), edit(value))


Place = tuple[int, int, np.dtype[Any], bool]  # file, byte, dtype, transposed


def _places(files: list[Path], value: Array) -> list[Place]:
    found: list[Place] = []
    for number, file in enumerate(files):
        content = file.read_bytes()
        for dtype in (np.dtype(np.float16), np.dtype(np.float32)):
            for transposed in (False, True)[: 2 if value.ndim == 2 else 1]:
                wanted = _bytes(value, dtype, transposed)
                found += [(number, start, dtype, transposed) for start in _occurrences(content, wanted)]
    if not found:
        raise LookupError(f"a parameter of shape {value.shape} is in none of {[file.name for file in files]}")
    return found


def _bytes(value: Array, dtype: np.dtype[Any], transposed: bool) -> bytes:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(value.T if transposed else value).astype(dtype).tobytes()


def _occurrences(content: bytes, wanted: bytes) -> Iterator[int]:
    start = content.find(wanted)
    while start >= 0:
        yield start
        start = content.find(wanted, start + len(wanted))


def _write(files: list[Path], places: list[Place], value: Array) -> None:
    for number, start, dtype, transposed in places:
        with files[number].open("r+b") as stream:
            stream.seek(start)
            stream.write(_bytes(value, dtype, transposed))


def _change_epsilon(model: TargetModel, files: list[Path], module: str, stored: StoredWeights, wiring: Wiring) -> None:
    """Change the constant that keeps a normalisation from dividing by zero."""
    if model.target == "ort":
        import onnx

        graph = onnx.load(str(files[0]), load_external_data=False)
        for node in graph.graph.node:
            if any(entry.value == module for entry in node.metadata_props):
                for attribute in node.attribute:
                    if attribute.name == "epsilon":
                        attribute.f = WRONG_EPSILON
                        onnx.save(graph, str(files[0]))
                        return
    elif model.target == "ncnn":
        _change_ncnn_epsilon(files, stored.read(f"{module}.weight"))
        return
    else:
        own = next((n.outputs[0] for n in wiring.nodes if n.module == module and n.op == str(_LAYER_NORM)), "")
        _change_mnn_epsilon(files[0], module, own)
        return
    raise LookupError(f"no epsilon of {module}")


def _change_ncnn_epsilon(files: list[Path], gamma: Array) -> None:
    from diffusette.runtimes.ncnn.param import parse
    from diffusette.runtimes.ncnn.slots import spans_of

    ((_, place, _, _),) = [found for found in _places(files, gamma) if found[0] == 1]
    for slot, start, _ in spans_of(parse(files[0].read_text()), files[1]):
        if start == place:
            key = "2" if slot.type == "GroupNorm" else "1"
            line = next(line for line in files[0].read_text().splitlines() if line.split()[1:2] == [slot.layer])
            changed = re.sub(rf" {key}=\S+", f" {key}={WRONG_EPSILON}", line)
            assert changed != line
            files[0].write_text(files[0].read_text().replace(line, changed))
            return
    raise LookupError("no layer reads these weights")


def _change_mnn_epsilon(file: Path, module: str, own: str) -> None:
    """A normalisation has its scale inside of its operation, or in the multiplication after it."""
    opened = MnnFile(file)
    wires = opened.wires()
    makers = {tensor: op for op in wires for tensor in op.outputs}
    tensor = own or next(op.inputs[0] for op in wires if f"{module}.weight" in op.inputs)
    while makers[tensor].type != _LAYER_NORM:
        tensor = makers[tensor].inputs[0]
    op = next(op for op in opened._ops if op.name == makers[tensor].name)
    assert op.main is not None
    place = op.main.Pos + op.main.Offset(_slot(_EPSILON_FIELD))
    opened._bytes.close()
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(struct.pack("<f", WRONG_EPSILON))
