"""Faults planted in built models: what a converter, a copy or an update of a runtime might do to one module.

Weights are found in a model's files by their bytes, so one way of planting serves all targets: in any of their
layouts a float parameter is there as float16 or float32, as PyTorch has it or transposed; and codes are in one of a few
packings, with their scales elsewhere. Files are mapped, not read: `benchmarks/planted_faults.py` plants in models of
full size.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from diffusette.quantize.codes import Codes
from diffusette.quantize.stored_weights import StoredWeights
from diffusette.runtimes.mnn.mnn_file import MnnFile, _slot
from diffusette.runtimes.ncnn.codes import unit
from diffusette.runtimes.nibbles import pack_nibbles
from diffusette.runtimes.ort.packing import _in_pairs
from diffusette.runtimes.taps import Wiring
from diffusette.stages.artifacts import TargetModel
from numpy.typing import NDArray

Array = NDArray[Any]
Form = Callable[[Array, Codes], Array]  # codes or scales -> as a runtime stores them
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


def guilty(fault: Fault) -> set[str]:
    """The modules that a fault is in."""
    if fault.kind == "swapped q and k":
        return {f"{fault.module}.to_q", f"{fault.module}.to_k"}
    return {fault.module}


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
"""Kind -> the parameter, and what becomes of it. Further kinds: "wrong epsilon", "swapped q and k", and `CODED`."""


def one_scale_lost(scales: Array) -> Array:
    """The scales of one output channel that is in the middle are gone: one."""
    damaged = scales.copy()
    damaged[len(scales) // 2] = 1
    return damaged


def swapped_scales(scales: Array) -> Array:
    """The scales of the first two groups of every channel change places; of the first two channels with one each."""
    damaged = scales.copy()
    if scales.shape[1] > 1:
        damaged[:, :2] = scales[:, 1::-1]
    else:
        damaged[:2] = scales[1::-1]
    return damaged


def shifted_index(values: Array, bits: int) -> Array:
    """Every code is the next one in the codebook, and the last is the first."""
    half = 2 ** (bits - 1)
    return ((values.astype(np.int16) + 1 + half) % (2 * half) - half).astype(np.int8)


def wrong_zero_point(values: Array, bits: int) -> Array:
    """Every code counts from another zero, one lower, as far as there are codes."""
    return np.maximum(values, 1 - 2 ** (bits - 1)) - np.int8(1)


CODED: Final = ("one scale lost", "swapped scales", "shifted index", "wrong zero point")
"""Kinds of faults in weights that are stored as integers."""


def plant(fault: Fault, model: TargetModel, stored: StoredWeights, wiring: Wiring) -> None:
    """Damage the files of `model`, which hold the weights `stored`, in place.

    Raises:
        LookupError: the fault has no place in them.
    """
    files = [model.folder / file for file in model.files]
    if fault.kind == "wrong epsilon":
        _change_epsilon(model, files, fault.module, wiring)
    elif fault.kind == "swapped q and k":
        query, key = (stored.read(f"{fault.module}.{name}.weight") for name in ("to_q", "to_k"))
        of_query, of_key = _places(files, query), _places(files, key)
        _write(files, of_query, key)
        _write(files, of_key, query)
    elif fault.kind in CODED:
        name = f"{fault.module}.weight"
        _damage_codes(files, fault.kind, stored.codes(name), stored.scheme(name).weight_bits)
    else:
        leaf, edit = EDITS[fault.kind]
        value = stored.read(f"{fault.module}.{leaf}")
        _write(files, _places(files, value), edit(value))


def _damage_codes(files: list[Path], kind: str, codes: Codes, bits: int) -> None:
    """Change codes or scales wherever they lie, in each of the forms that a runtime stores them in."""
    whole: Array
    forms: tuple[Form, ...]
    edit: Callable[[Array], Array]
    if kind in ("one scale lost", "swapped scales"):
        whole, forms = codes.scales, _SCALE_FORMS
        edit = one_scale_lost if kind == "one scale lost" else swapped_scales
    else:
        whole, forms = codes.values, _CODE_FORMS[bits]
        edit = partial(shifted_index if kind == "shifted index" else wrong_zero_point, bits=bits)
    found = 0
    for form in forms:
        old, new = (np.ascontiguousarray(form(value, codes)).tobytes() for value in (whole, edit(whole)))
        if old == new:
            continue
        for file in files:
            for start in _occurrences(file, old):
                _overwrite(file, start, new)
                found += 1
    if not found:
        raise LookupError(f"codes of shape {codes.values.shape} are in none of {[file.name for file in files]}")


_SCALE_FORMS: Final[tuple[Form, ...]] = (
    lambda scales, _: scales,
    lambda scales, _: scales.T,  # ort, where the graph takes the weight transposed
    lambda scales, codes: scales / unit(codes),  # ncnn, beside a codebook
)
_CODE_FORMS: Final[dict[int, tuple[Form, ...]]] = {
    8: (
        lambda values, _: values,  # ort, ncnn
        lambda values, _: values.T,  # ort
        lambda values, _: values.view(np.uint8) ^ 0x80,  # mnn, and ncnn's codebooks
    ),
    4: (
        lambda values, _: _in_pairs(values.reshape(-1)),  # ort
        lambda values, _: _in_pairs(values.T.reshape(-1)),  # ort
        lambda values, codes: pack_nibbles(Codes(values, codes.scales)),  # ncnn
        lambda values, _: _in_pairs(values.reshape(-1, 2)[:, ::-1].reshape(-1)),  # mnn: the first in the high half
    ),
}


Place = tuple[int, int, np.dtype[Any], bool]  # file, byte, dtype, transposed


def _places(files: list[Path], value: Array) -> list[Place]:
    found: list[Place] = []
    for number, file in enumerate(files):
        for dtype in (np.dtype(np.float16), np.dtype(np.float32)):
            for transposed in (False, True)[: 2 if value.ndim == 2 else 1]:
                # MNN's converter stores -0.0 as 0.0, which is what adding 0.0 makes of it
                for wanted in {_bytes(value, dtype, transposed), _bytes(value + 0.0, dtype, transposed)}:
                    found += [(number, start, dtype, transposed) for start in _occurrences(file, wanted)]
    if not found:
        raise LookupError(f"a parameter of shape {value.shape} is in none of {[file.name for file in files]}")
    return found


def _bytes(value: Array, dtype: np.dtype[Any], transposed: bool) -> bytes:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(value.T if transposed else value).astype(dtype).tobytes()


def _occurrences(file: Path, wanted: bytes) -> list[int]:
    found = []
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(wanted)
        while start >= 0:
            found.append(start)
            start = content.find(wanted, start + len(wanted))
    return found


def _write(files: list[Path], places: list[Place], value: Array) -> None:
    for number, start, dtype, transposed in places:
        _overwrite(files[number], start, _bytes(value, dtype, transposed))


def _overwrite(file: Path, start: int, content: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(start)
        stream.write(content)


def _change_epsilon(model: TargetModel, files: list[Path], module: str, wiring: Wiring) -> None:
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
        _change_ncnn_epsilon(files[0], module, wiring)
        return
    else:
        own = next((n.outputs[0] for n in wiring.nodes if n.module == module and n.op == str(_LAYER_NORM)), "")
        _change_mnn_epsilon(files[0], module, own)
        return
    raise LookupError(f"no epsilon of {module}")


def _change_ncnn_epsilon(param: Path, module: str, wiring: Wiring) -> None:
    keys = {"GroupNorm": 2, "LayerNorm": 1}
    own = next((node for node in wiring.nodes if node.module == module and node.op in keys), None)
    if own is None:
        raise LookupError(f"no layer normalises for {module}")
    lines = param.read_text().splitlines(keepends=True)
    (number,) = [
        number for number, line in enumerate(lines) if line.split()[:1] == [own.op] and own.outputs[0] in line.split()
    ]
    changed = re.sub(rf" {keys[own.op]}=\S+", f" {keys[own.op]}={WRONG_EPSILON}", lines[number])
    assert changed != lines[number]
    lines[number] = changed
    param.write_text("".join(lines))


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
