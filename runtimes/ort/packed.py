"""What packed weights are made of: initializers, and nodes that stand where a float weight stood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

Store = Callable[[str, NDArray[Any], str], Any]  # name, array, ONNX dtype name -> TensorProto whose bytes are written


@dataclass
class Packed:
    """What replaces one float weight: `nodes` compute it under its own name, or `consumers` are exchanged."""

    initializers: list[Any] = field(default_factory=list)
    nodes: list[Any] = field(default_factory=list)
    consumers: dict[str, list[Any]] = field(default_factory=dict)  # name of a node -> what takes its place


def add_node(
    made: list[Any], stem: str, origin: Any, op: str, inputs: list[str], *, output: str = "", **attributes: Any
) -> str:
    """Append a node to `made`, of the module that `origin` is of; return the name of its output."""
    from onnx import helper

    output = output or f"{stem}.{len(made)}"
    made.append(helper.make_node(op, inputs, [output], name=f"{stem}.{op}{len(made)}", **attributes))
    if origin is not None:
        made[-1].metadata_props.extend(origin.metadata_props)
    return output
