"""Where an ONNX graph keeps its weights: checked before any native code maps the file."""

from __future__ import annotations

from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, Final

from ...pipeline.errors import BundleError

_LONGEST_NAME: Final = 255  # bytes of a file's name, NAME_MAX of limits.h


def read_graph(file: Path) -> Any:
    """The `onnx.ModelProto` of `file` without the weights that lie beside it.

    Raises:
        BundleError: `file` is no ONNX model, or its external data is refused by `data_files`.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(file), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BundleError(f"{file}: cannot be read as an ONNX model: {error}") from None
    data_files(model, file)
    return model


def data_files(model: Any, file: Path) -> tuple[str, ...]:
    """Names of the external-data files of `model`, which was read from `file`; all lie in the same folder.

    ONNX Runtime refuses some of what follows, and `onnx.checker` less; neither names the tensor.

    Raises:
        BundleError: a file would lie elsewhere, is a link, is missing, or ends before a tensor does.
    """
    from onnx import TensorProto

    names: dict[str, None] = {}
    for tensor in _tensors(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        if any(isinstance(value, bytes) for value in place.values()):  # what protobuf gives for bytes that are no UTF-8
            raise BundleError(f"{file}: the place of weights is no text: {place}", hint="convert the checkpoint again")
        where = f"{file}: weights of {tensor.name!r}"
        name = place.get("location", "")
        if (
            name in ("", ".", "..")
            or PurePosixPath(name).name != name
            or "\\" in name
            or len(name.encode()) > _LONGEST_NAME
        ):
            raise BundleError(f"{where} lie in {name!r}, which is not a file of the same folder")
        data = file.parent / name
        if data.is_symlink() or not data.is_file():
            raise BundleError(f"{where} lie in {data}, which is {'a link' if data.is_symlink() else 'missing'}")
        bits = _size(tensor, where)
        try:
            offset, length = int(place.get("offset", 0)), int(place.get("length", -(-bits // 8)))
        except ValueError:
            raise BundleError(f"{where} have the place {place}, which is not in numbers") from None
        if length != -(-bits // 8):
            raise BundleError(f"{where} take {-(-bits // 8)} bytes, the graph says {length}")
        if offset < 0 or offset + length > data.stat().st_size:
            raise BundleError(
                f"{where} end at byte {offset + length}, {data} has {data.stat().st_size}",
                hint="copy or build it again",
            )
        names[name] = None
    return tuple(names)


def _size(tensor: Any, where: str) -> int:
    """Bits that the values of `tensor` take."""
    from onnx import helper

    if any(size < 0 for size in tensor.dims):
        raise BundleError(f"{where} have the shape {list(tensor.dims)}")
    try:
        return int(prod(tensor.dims)) * _bits(helper.tensor_dtype_to_np_dtype(tensor.data_type), tensor.data_type)
    except KeyError:
        raise BundleError(f"{where} have the data type {tensor.data_type}, which ONNX does not know") from None


def weight_bits(model: Any) -> tuple[int, int]:
    """Bits that the floating-point initializers of `model` take, and how many numbers they are."""
    from onnx import TensorProto, helper

    kinds = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
    bits = numbers = 0
    for tensor in model.graph.initializer:
        if tensor.data_type in kinds:
            numbers += prod(tensor.dims)
            bits += prod(tensor.dims) * _bits(helper.tensor_dtype_to_np_dtype(tensor.data_type), tensor.data_type)
    return bits, numbers


def _bits(dtype: Any, data_type: int) -> int:
    from onnx import TensorProto

    packed = data_type in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)
    return 4 if packed else 8 * int(dtype.itemsize)


def _tensors(graph: Any) -> Any:
    """Initializers and constants of `graph` and of the graphs inside its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _tensors(inner)
