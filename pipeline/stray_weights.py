"""Weights that an ONNX graph keeps in other files: only those that a manifest declares may be loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import BundleError
from .safe_path import inside


def stray_weights(root: Path, files: Collection[str]) -> list[tuple[str, str]]:
    """External data of the ONNX graphs among `files` that is not itself one of `files`.

    A runtime reads whatever file a graph names. One that is not declared is not hashed, and may lie anywhere.

    Args:
        root: the bundle's folder.
        files: paths below it.
    Returns:
        (graph, location as the graph spells it).
    Raises:
        BundleError: a `.onnx` file holds no ONNX graph.
    """
    return [
        (file, location)
        for file in files
        if file.endswith(".onnx")
        for location in _external_locations(Path(root, file))
        if _beside(file, location) not in files
    ]


def _beside(graph: str, location: str) -> str | None:
    """Path below the bundle of external data at `location`, None when it could lie elsewhere."""
    try:
        return str(PurePosixPath(graph).parent / inside(location))
    except ValueError:
        return None


def _external_locations(graph: Path) -> list[str]:
    """Where the tensors of an ONNX graph lie, if not in it. No external data is opened."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(graph, load_external_data=False)
    except DecodeError:
        raise BundleError(f"{graph}: holds no ONNX graph", hint="convert the checkpoint again") from None
    found: set[str] = set()
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            places = [_text(entry.value) for entry in tensor.external_data if entry.key == "location"]
            found.update(places or [""])  # an external tensor without a place is as wrong as one with a bad one
    return sorted(found)


def _text(value: str | bytes) -> str:
    """protobuf gives bytes where the file holds no UTF-8."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value


def _tensors(message: Any) -> Iterator[Any]:
    """Every TensorProto below a protobuf message, wherever it hides: attributes, subgraphs, functions, training."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in [value] if hasattr(value, "ListFields") else value:
            if field.message_type.name == "TensorProto":
                yield inner
            else:
                yield from _tensors(inner)
