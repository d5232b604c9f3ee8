"""The weights of a `.mnn` whose converter has quantised them, replaced by our own codes.

MNN's converter rounds by its own rule, and to one number of bits. Its structure is right for any: an operator says
where in `.mnn.weight` its codes, scales and bias lie, and how they are stored. So a new weight file is written, and
those numbers are changed in place: docs/decisions/0012.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np
from flatbuffers.table import Table

from ...quantize.stored_weights import StoredWeights
from ...stages.errors import ToolCrashed
from .codes import decode, encode
from .mnn_file import CONVOLUTIONS, QUANTISED, QUANTISED_TYPE, ExternalData, MnnFile

if TYPE_CHECKING:
    import onnx_ir as ir

_LAYOUT: Final = re.compile(r"\.layout\d+$")  # of a parameter that a graph holds twice, see `WeightSlot`
_LINEAR: Final = "__matmul_converted"  # MNN's suffix for linear layers, which it runs as convolutions
_BITS: Final = 7  # of IDSTQuan
HALVES, FLOATS = 3, 8  # IDSTQuan.type; 1: integers
_CHUNK: Final = 2**24


@dataclass
class _Patches:
    """Bytes of the `.mnn` that change."""

    places: dict[int, bytes]

    def number(self, table: Table, field: int, value: int) -> None:
        offset = table.Offset(4 + 2 * field)
        if not offset:
            raise ToolCrashed(
                f"mnnconvert left out field {field} of a quantised weight", hint="report your MNN version"
            )
        self.places[table.Pos + offset] = struct.pack("<i", value)


def store_weights(file: MnnFile, stored: StoredWeights, owners: Mapping[str, str]) -> None:
    """Replace what the converter made of the weights by what `stored` says. Invalidates `file`: open it again.

    Args:
        file: converted to 8 bits, symmetric, its weights in a file of their own.
        owners: name of a convolution or linear layer's operator -> parameter.
    Raises:
        ToolCrashed: an operator is not among `owners`, or holds another weight than its parameter's.
    """
    patches, old_file = _Patches({}), file.weight_file
    new_file = old_file.with_name(f"{old_file.name}.new")
    with old_file.open("rb") as old, new_file.open("wb") as new:
        for data in file.external():
            place, sizes = new.tell(), list(data.sizes)
            if data.type in CONVOLUTIONS:
                if data.name not in owners:
                    raise ToolCrashed(f"{file.path.name}: no parameter belongs to MNN's operator {data.name!r}")
                quantised = file.table(data.main, QUANTISED)
                if quantised is None or len(sizes) != 4:  # codes, scales, bias, index of a sparse weight
                    raise ToolCrashed(f"{file.path.name}: mnnconvert did not quantise {data.name!r}")
                _check(old, data, stored, owners[data.name])
                sizes[:2] = _write(new, patches, quantised, stored, owners[data.name])
                _copy(old, data.start + sum(data.sizes[:2]), new, sum(sizes[2:]))
            else:
                _copy(old, data.start, new, sum(sizes))
            patches.places[data.place] = struct.pack(f"<{1 + len(sizes)}q", place, *sizes)
    file.patch(patches.places)
    new_file.replace(old_file)


def _check(old: BinaryIO, data: ExternalData, stored: StoredWeights, parameter: str) -> None:
    """The converter's own codes must be near the parameter: an operator can then not get another one's weight."""
    old.seek(data.start)
    buffer, scales = old.read(data.sizes[0]), np.frombuffer(old.read(data.sizes[1]), np.float32)
    expected = stored.read(parameter)
    expected = expected.reshape(expected.shape[0], -1)
    try:
        near = decode(buffer, expected.shape).astype(np.float32) * scales[:, None]
        wrong = np.abs(near - expected).max(axis=1) > 0.51 * scales
    except ValueError as error:
        raise ToolCrashed(f"MNN's operator {data.name!r} does not hold {parameter}: {error}") from None
    if wrong.any():
        raise ToolCrashed(f"MNN's operator {data.name!r} does not hold {parameter}: {int(wrong.sum())} rows differ")


def _write(new: BinaryIO, patches: _Patches, quantised: Table, stored: StoredWeights, parameter: str) -> list[int]:
    """Append a weight and its scales; their lengths."""
    scheme = stored.scheme(parameter)
    if not scheme.is_float:
        codes = stored.codes(parameter)
        patches.number(quantised, _BITS, scheme.weight_bits)
        return [new.write(encode(codes, scheme.weight_bits)), new.write(codes.scales.tobytes())]
    half = scheme.name == "fp16"
    patches.number(quantised, QUANTISED_TYPE, HALVES if half else FLOATS)
    return [new.write(stored.read(parameter).astype(np.float16 if half else np.float32).tobytes()), 0]


def _copy(old: BinaryIO, start: int, new: BinaryIO, length: int) -> None:
    old.seek(start)
    while length > 0:
        chunk = old.read(min(length, _CHUNK))
        if not chunk:
            raise ToolCrashed("mnnconvert wrote a weight file that is too short")
        new.write(chunk)
        length -= len(chunk)


def owners_of(graph: ir.Graph, parameters: Container[str]) -> dict[str, str]:
    """Operator of MNN -> parameter, for every weight of a convolution or linear layer of an ONNX graph.

    MNN names an operator after the output of the node, or of the Add of a bias that it merges into it.
    """
    owners = {}
    for node in graph:
        weight = node.inputs[1] if node.op_type in ("Conv", "Gemm", "MatMul") else None
        if weight is None or not weight.is_initializer():
            continue
        parameter = _LAYOUT.sub("", str(weight.name))
        if parameter not in parameters:
            continue
        users = [use.node for use in node.outputs[0].uses()]
        for result in (node, *(user for user in users if user.op_type == "Add")):
            owners[f"{result.outputs[0].name}{_LINEAR if node.op_type != 'Conv' else ''}"] = parameter
    return owners
