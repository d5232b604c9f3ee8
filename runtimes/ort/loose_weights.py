"""A `.ort` file made without its weights, which are then written behind it one after the other.

ONNX Runtime holds every weight twice while it writes a `.ort` file: 3.6 GB for the UNet of Stable Diffusion 1.5 in
float16. It needs none of them: what it rewrites in a float16 graph it rewrites by shapes, for each weight stands behind
a Cast and is no constant of any operator. So those weights are declared as inputs, which have shapes and no values;
ONNX Runtime writes a file of a few megabytes; and in that file, a flatbuffer, they are made initializers again.

A flatbuffer's offsets point forward from where they stand, so what replaces a part of it may lie behind its end
(flatbuffers, "Internals"). The lists of initializers and of inputs are
written anew there, and behind them the values. What they replace stays as a few unread kilobytes: biases and norms.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

from ...stages.errors import ModelError
from .ort_file import offset_vector, schema

_ALIGNMENT: Final = 16  # of what is appended: at least that of everything in the schema
_CHUNK: Final = 8 * 2**20
_LEFT_AT_MOST: Final = (
    0.05  # of the bytes taken out; biases and norms are 2 to 3 % of the demo's models, less of larger ones
)
_INITIALIZERS, _INPUTS = 4, 14  # of a graph's vtable: 4 + 2 x the place of the field in ort.fbs
_RAW_DATA: Final = 12  # of a tensor's


@dataclass(frozen=True, slots=True)
class LooseWeight:
    """An initializer that was taken out of a graph: where its float16 values lie."""

    name: str
    dims: tuple[int, ...]
    file: str  # beside the graph
    offset: int

    @property
    def bytes(self) -> int:
        return 2 * prod(self.dims)


def take_weights_out(model: Any) -> tuple[LooseWeight, ...]:
    """Turn the large float16 initializers of `model` (an `onnx.ModelProto`), in place, into inputs; by name.

    Only those whose values lie in another file and that nothing but Cast reads; and none where what would be left
    is more than a small part of them, because what is left lies in the file twice in the end.
    """
    from onnx import TensorProto, helper

    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    kept, taken = [], []
    for tensor in model.graph.initializer:
        outside = tensor.data_location == TensorProto.EXTERNAL
        if outside and tensor.data_type == TensorProto.FLOAT16 and readers.get(tensor.name) == {"Cast"}:
            place = {entry.key: entry.value for entry in tensor.external_data}
            taken.append(LooseWeight(tensor.name, tuple(tensor.dims), place["location"], int(place.get("offset", 0))))
        else:
            kept.append(tensor)
    numbers = {TensorProto.INT4: 0.5, TensorProto.UINT4: 0.5, TensorProto.INT8: 1, TensorProto.UINT8: 1}
    left = sum(prod(tensor.dims) * numbers.get(tensor.data_type, 4) for tensor in kept)
    if left > _LEFT_AT_MOST * sum(weight.bytes for weight in taken):
        return ()
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for weight in taken:
        model.graph.input.append(helper.make_tensor_value_info(weight.name, TensorProto.FLOAT16, weight.dims))
    return tuple(sorted(taken, key=lambda weight: weight.name))


def put_weights_back(ort_file: Path, weights: Sequence[LooseWeight], folder: Path) -> int:
    """Make the inputs `weights` of `ort_file` its initializers, in place, with the values that lie in `folder`.

    Returns:
        Bytes of the lists that were written anew: what lies in the file twice.
    Raises:
        ModelError: the file has not those inputs, or lists in a way that this module does not know.
    """
    loose = {weight.name.encode(): weight for weight in weights}
    with ort_file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        graph = _graph(content)
        inputs = [graph.Inputs(place) for place in range(graph.InputsLength())]
        if not loose.keys() <= set(inputs):
            raise ModelError(
                f"{ort_file}: ONNX Runtime dropped a weight that its graph reads", hint="report this as a bug"
            )
        fields = [graph._tab.Pos + _present(graph, field, ort_file) for field in (_INITIALIZERS, _INPUTS)]
        lists = _lists(graph, loose, [name for name in inputs if name not in loose], ort_file)
    with ort_file.open("r+b") as file:
        start = _padded(file, 0)
        file.write(lists)
        listed = schema("Graph").Graph.GetRootAs(lists, 0)
        for field, vector in zip(fields, (_INITIALIZERS, _INPUTS), strict=True):
            place = start + listed._tab.Vector(listed._tab.Offset(vector)) - 4  # of the count, before the elements
            _point(file, field, place)
        for number in range(listed.InitializersLength()):
            tensor = listed.Initializers(number)
            weight = loose.get(tensor.Name())
            if weight is not None:
                place = _padded(file, 4)
                _copy(weight, folder, file)
                _point(file, start + tensor._tab.Pos + tensor._tab.Offset(_RAW_DATA), place)
    return len(lists)


def _graph(content: Any) -> Any:
    return schema("InferenceSession").InferenceSession.GetRootAs(content, 0).Model().Graph()


def _present(graph: Any, field: int, file: Path) -> int:
    offset = int(graph._tab.Offset(field))
    if not offset:
        raise ModelError(f"{file}: its graph has no list of initializers or of inputs", hint="report this as a bug")
    return offset


def _lists(graph: Any, loose: dict[bytes, LooseWeight], inputs: list[bytes], file: Path) -> bytes:
    """A flatbuffer whose root is a graph with nothing but all initializers, by name, and `inputs`.

    The values of `loose` are not in it: their tensors point at the placeholder of none.
    """
    import flatbuffers

    kinds, tensors, graphs = schema("TensorDataType").TensorDataType, schema("Tensor"), schema("Graph")
    small = {}
    for place in range(graph.InitializersLength()):
        tensor = graph.Initializers(place)
        if tensor.StringDataLength() or tensor.ExternalDataOffset() >= 0:
            raise ModelError(f"{file}: {tensor.Name()!r} is no plain initializer", hint="report this as a bug")
        values = tensor.RawDataAsNumpy().tobytes() if tensor.RawDataLength() else b""
        dims = [tensor.Dims(axis) for axis in range(tensor.DimsLength())]
        small[tensor.Name()] = (tensor.DataType(), dims, values)
    found = {name: (kinds.FLOAT16, list(weight.dims), b"") for name, weight in loose.items()} | small
    builder = flatbuffers.Builder(2**20)
    listed = []
    for name in sorted(found):
        kind, dims, values = found[name]
        named = builder.CreateString(name)
        builder.StartVector(8, len(dims), 8)
        for size in reversed(dims):
            builder.PrependInt64(size)
        sizes = builder.EndVector()
        builder.StartVector(1, len(values), _ALIGNMENT)
        builder.head = builder.head - len(values)
        builder.Bytes[builder.head : builder.head + len(values)] = values
        data = builder.EndVector()
        tensors.Start(builder)
        tensors.AddName(builder, named)
        tensors.AddDims(builder, sizes)
        tensors.AddDataType(builder, kind)
        tensors.AddRawData(builder, data)
        listed.append(tensors.End(builder))
    names = [builder.CreateString(name) for name in inputs]
    initializers, named_inputs = offset_vector(builder, listed), offset_vector(builder, names)
    graphs.Start(builder)
    graphs.AddInitializers(builder, initializers)
    graphs.AddInputs(builder, named_inputs)
    builder.Finish(graphs.End(builder))
    return bytes(builder.Output())


def _padded(stream: BinaryIO, before: int) -> int:
    """Append zeros until the offset of the end plus `before` is aligned; return the new end."""
    end = stream.seek(0, 2)
    stream.write(bytes(-(end + before) % _ALIGNMENT))
    return stream.tell()


def _point(stream: BinaryIO, field: int, target: int) -> None:
    """Let the offset at the byte `field` point at `target`; leave the stream at its end."""
    stream.seek(field)
    stream.write(struct.pack("<I", target - field))
    stream.seek(0, 2)


def _copy(weight: LooseWeight, folder: Path, stream: BinaryIO) -> None:
    """Append the values of `weight` as a vector: their count, then they."""
    stream.write(struct.pack("<I", weight.bytes))
    left = weight.bytes
    with (folder / weight.file).open("rb") as source:
        source.seek(weight.offset)
        while left:
            chunk = source.read(min(_CHUNK, left))
            if not chunk:
                raise ModelError(f"{folder / weight.file} ends before the values of {weight.name!r} do")
            left -= stream.write(chunk)
