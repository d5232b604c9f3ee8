"""Weights that an ONNX graph keeps in other files: only those that a manifest declares may be loaded."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath

from ..stages.onnx_file import read_onnx
from ..stages.safe_path import inside


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
    found: set[str] = set()
    for tensor in read_onnx(graph).tensors:
        if tensor.external or tensor.place:  # without a location it is as wrong as with a bad one
            found.update(tensor.locations() or [""])
    return sorted(found)
