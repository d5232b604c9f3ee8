"""Where an ONNX graph keeps its weights: checked before any native code maps the file."""

from __future__ import annotations

from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, Final

from ...stages.errors import BundleError
from ...stages.onnx_file import BFLOAT16, BITS, DOUBLE, FLOAT, FLOAT16, OnnxFile, OnnxTensor, read_onnx

_LONGEST_NAME: Final = 255  # bytes of a file's name, NAME_MAX of limits.h


def read_graph(file: Path) -> Any:
    """The `onnx.ModelProto` of `file` without the weights that lie beside it.

    Raises:
        BundleError: `file` is no ONNX model, or its external data is refused by `data_files`.
    """
    import onnx
    from google.protobuf.message import DecodeError

    data_files(read_onnx(file), file)
    try:
        return onnx.load(str(file), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BundleError(f"{file}: cannot be read as an ONNX model: {error}") from None


def data_files(model: OnnxFile, file: Path) -> tuple[str, ...]:
    """Names of the external-data files of `model`, which `file` holds; all lie in the same folder.

    ONNX Runtime refuses some of what follows, and `onnx.checker` less; neither names the tensor.

    Raises:
        BundleError: a file would lie elsewhere, is a link, is missing, or ends before a tensor does.
    """
    names: dict[str, None] = {}
    for tensor in model.tensors:
        if not tensor.external:
            continue
        place = dict(tensor.place)
        where = f"{file}: weights of {tensor.name!r}"
        if len(place) != len(tensor.place):
            raise BundleError(f"{where} have two places: {tensor.place}", hint="convert the checkpoint again")
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


def _size(tensor: OnnxTensor, where: str) -> int:
    """Bits that the values of `tensor` take."""
    if any(size < 0 for size in tensor.dims):
        raise BundleError(f"{where} have the shape {list(tensor.dims)}")
    if tensor.data_type not in BITS:
        raise BundleError(f"{where} have the data type {tensor.data_type}, whose size outside a graph is not known")
    return prod(tensor.dims) * BITS[tensor.data_type]


def weight_bits(model: OnnxFile) -> tuple[int, int]:
    """Bits that the floating-point initializers of `model` take, and how many numbers they are."""
    kinds = (FLOAT, FLOAT16, BFLOAT16, DOUBLE)
    numbers = [(tensor.data_type, prod(tensor.dims)) for tensor in model.initializers if tensor.data_type in kinds]
    return sum(BITS[kind] * count for kind, count in numbers), sum(count for _, count in numbers)
