"""ncnn's `.param` file: a graph in text, one layer a line.

Source: Tencent/ncnn, docs/developer-guide/param-and-model-file-structure.md. After the magic number and the counts of
layers and blobs, a line is `type name n_inputs n_outputs inputs... outputs... key=value...`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from ...stages.errors import ModelError

MAGIC: Final = "7767517"


@dataclass(frozen=True, slots=True)
class Layer:
    """One line of a `.param` file. `inputs` and `outputs` are names of blobs, ncnn's word for activations."""

    type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: Mapping[int, str]  # by ncnn's numeric key, values as written

    def number(self, key: int, default: int = 0) -> int:
        """The integer under `key`; layers leave out what equals ncnn's default.

        Raises:
            ModelError: what stands there is no integer.
        """
        value = self.params.get(key, str(default))
        try:
            return int(value)
        except ValueError:
            what = f"{self.type} {self.name}: parameter {key} is {value[:40]!r}, a whole number is needed"
            raise ModelError(what, hint="convert again") from None


def parse(text: str, file: str = "param") -> tuple[Layer, ...]:
    """Layers of a `.param` file, in the order in which their weights follow each other in the `.bin`.

    Raises:
        ModelError: the magic number or a line is wrong, or layers are missing; `file` says where.
    """
    lines = text.split("\n")
    if lines[0].strip() != MAGIC or len(lines) < 2:
        raise ModelError(f"{file} is not an ncnn graph: it starts with {lines[0][:40]!r}, not {MAGIC}")
    layers = tuple(_layer(line, f"{file}:{number}") for number, line in enumerate(lines[2:], start=3) if line.strip())
    if lines[1].split()[:1] != [str(len(layers))]:
        raise ModelError(
            f"{file} promises {lines[1].split()[:1]!r:.40} layers and has {len(layers)}: it is cut or edited"
        )
    return layers


def _layer(line: str, where: str) -> Layer:
    try:
        kind, name, n_inputs, n_outputs, *rest = line.split()
        first_output, first_param = int(n_inputs), int(n_inputs) + int(n_outputs)
        pairs = (word.split("=", 1) for word in rest[first_param:])
        params = {int(key): value for key, value in pairs}
    except ValueError as error:
        raise ModelError(f"{where} is not a line of an ncnn graph ({error}): {line[:80]!r}") from None
    if not 0 <= first_output <= first_param:
        raise ModelError(f"{where} counts {n_inputs} inputs and {n_outputs} outputs: {line[:80]!r}")
    if len(rest) < first_param:
        raise ModelError(f"{where} names {len(rest)} blobs of {first_param}: {line[:80]!r}")
    return Layer(kind, name, tuple(rest[:first_output]), tuple(rest[first_output:first_param]), params)


def render(layers: Iterable[Layer]) -> str:
    """The `.param` text of `layers`, laid out as pnnx does."""
    layers = tuple(layers)
    blobs = sum(len(layer.outputs) for layer in layers)
    lines = [MAGIC, f"{len(layers)} {blobs}"]
    for layer in layers:
        # pnnx's columns, but for the many short-lived layers of `low_bit`
        head = f"{layer.type} {layer.name}" if layer.name.startswith("_") else f"{layer.type:<24} {layer.name:<24}"
        head += f" {len(layer.inputs)} {len(layer.outputs)}"
        params = (f"{key}={value}" for key, value in layer.params.items())
        lines.append(" ".join([head, *layer.inputs, *layer.outputs, *params]))
    return "\n".join([*lines, ""])


def rename_blobs(layers: Iterable[Layer], names: Mapping[str, str]) -> tuple[Layer, ...]:
    """`layers` with blobs renamed; an Input layer takes the name of its blob.

    Raises:
        ModelError: no layer makes a blob of an old name, or one makes a blob of a new name already.
    """
    layers = tuple(layers)
    made = {blob for layer in layers for blob in layer.outputs}
    if missing := sorted(names.keys() - made):
        raise ModelError(f"no layer of the ncnn graph makes the blob {', '.join(missing)}")
    if taken := sorted((made - names.keys()) & set(names.values())):
        raise ModelError(f"the ncnn graph has a blob named {', '.join(taken)} already")

    def renamed(layer: Layer) -> Layer:
        inputs = tuple(names.get(blob, blob) for blob in layer.inputs)
        outputs = tuple(names.get(blob, blob) for blob in layer.outputs)
        name = outputs[0] if layer.type == "Input" else layer.name
        return dataclasses.replace(layer, name=name, inputs=inputs, outputs=outputs)

    return tuple(map(renamed, layers))
