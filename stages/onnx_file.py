"""What an ONNX file says of its tensors and nodes, read without the package onnx: who only runs a bundle has none.

Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto), which protobuf keeps
stable; a test holds `_BELOW` against the descriptors of the package. docs/decisions/0105.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

from .errors import BundleError
from .wire import MAX_BYTES, fields, varints

# Message -> field -> message, for every way that leads to a TensorProto.
_BELOW: Final = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto", 6: "GraphProto", 10: "TensorProto", 11: "GraphProto",
        22: "SparseTensorProto", 23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "TensorProto": {},
}  # fmt: skip
_DEEPEST: Final = 100  # messages inside each other, protobuf's own limit
_MOST: Final = 2**20  # tensors and nodes; an SDXL UNet has ten thousand
_MOST_DIMS: Final = 64  # numpy's
_EXTERNAL: Final = 1  # TensorProto.DataLocation

FLOAT, UINT8, INT8, FLOAT16, DOUBLE, BFLOAT16 = 1, 2, 3, 10, 11, 16  # TensorProto.DataType
BITS: Final = MappingProxyType(
    {
        FLOAT: 32, UINT8: 8, INT8: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, FLOAT16: 16, DOUBLE: 64, 12: 32, 13: 64,
        14: 64, 15: 128, BFLOAT16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
    }
)  # fmt: skip
"""DataType -> bits that an element takes in a file; not of strings, nor of six-bit floats, which no runtime has."""


@dataclass(frozen=True, slots=True)
class OnnxTensor:
    """A TensorProto. `place` is its external_data, keys and values as the file has them."""

    name: str
    data_type: int
    dims: tuple[int, ...]
    external: bool
    place: tuple[tuple[str, str], ...]

    def locations(self) -> list[str]:
        return [value for key, value in self.place if key == "location"]


@dataclass(frozen=True, slots=True)
class OnnxNode:
    """A NodeProto; `module` is what the export noted: the PyTorch module that it came from, or ""."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    module: str


@dataclass
class OnnxFile:
    """Nodes and initializers are the main graph's; `tensors` are all that there are, wherever they hide."""

    nodes: list[OnnxNode] = field(default_factory=list)
    initializers: list[OnnxTensor] = field(default_factory=list)
    tensors: list[OnnxTensor] = field(default_factory=list)


def read_onnx(file: Path) -> OnnxFile:
    """Read `file`; no external data is opened.

    Raises:
        BundleError: it cannot be read, or holds no ONNX graph.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        return _walk(memoryview(file.read_bytes()))
    except (OSError, ValueError) as error:
        raise BundleError(f"{file}: holds no ONNX graph: {error}", hint="convert the checkpoint again") from None


def _walk(content: memoryview) -> OnnxFile:
    """A message that comes twice, which parsers merge, is read as two: a tensor then shows at least what it has."""
    found, count = OnnxFile(), 0
    waiting = [("ModelProto", "", content, 0)]
    while waiting:
        kind, parent, message, depth = waiting.pop()
        count += kind in ("TensorProto", "NodeProto")
        if depth > _DEEPEST or count > _MOST:
            raise ValueError(f"more than {_DEEPEST} messages in each other, or {_MOST} tensors and nodes")
        main = parent == "GraphProto" and depth == 2
        if kind == "TensorProto":
            found.tensors.append(tensor := _tensor(message))
            if main:
                found.initializers.append(tensor)
            continue
        if kind == "NodeProto" and main:
            found.nodes.append(_node(message))
        below = _BELOW[kind]
        waiting += reversed(
            [(below[number], kind, _bytes(value), depth + 1) for number, _, value in fields(message) if number in below]
        )
    return found


def _tensor(message: memoryview) -> OnnxTensor:
    name, data_type, external = "", 0, False
    dims: list[int] = []
    place: list[tuple[str, str]] = []
    for number, _, value in fields(message):
        if number == 1:
            dims += [value] if isinstance(value, int) else varints(value)
        elif number == 2:
            data_type = _number(value) % 2**32
        elif number == 8:
            name = _text(value)
        elif number == 13:
            place.append(_entry(value))
        elif number == 14:  # a parser that does not know a later value keeps the earlier one
            external |= _number(value) % 2**32 == _EXTERNAL
    if len(dims) > _MOST_DIMS:
        raise ValueError(f"{name!r} has {len(dims)} dimensions")
    signed = tuple(dim - 2**64 if dim >= 2**63 else dim for dim in dims)
    return OnnxTensor(name, data_type, signed, external, tuple(place))


def _node(message: memoryview) -> OnnxNode:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [""], 4: [""]}
    module = ""
    for number, _, value in fields(message):
        if number in texts:
            texts[number].append(_text(value))
        elif number == 9:
            key, text = _entry(value)
            module = text if key == "module" else module
    return OnnxNode(texts[4][-1], texts[3][-1], tuple(texts[1]), tuple(texts[2]), module)


def _entry(value: int | memoryview) -> tuple[str, str]:
    """Key and value of a StringStringEntryProto."""
    texts = {1: "", 2: ""}
    for number, _, text in fields(_bytes(value)):
        if number in texts:
            texts[number] = _text(text)
    return texts[1], texts[2]


def _text(value: int | memoryview) -> str:
    """Bytes that are no UTF-8 are spelled with backslashes, which no path of a bundle has."""
    return bytes(_bytes(value)).decode(errors="backslashreplace")


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where text or a message belongs")
    return value


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("text or a message where a number belongs")
    return value
