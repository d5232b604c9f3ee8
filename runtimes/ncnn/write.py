"""A checkpoint's weights into the places that an ncnn graph has for them, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from ...export.contract import output_specs
from ...quantize.codes_file import QuantizedWeights
from ...quantize.layer_ranges import LayerRanges
from ...quantize.plan import Plan
from ...quantize.stored_weights import StoredWeights
from ...stages.artifacts import ComponentSource, TargetModel, role_of
from ...stages.errors import ExportError
from ...stages.stage import Stage
from . import layout
from .codes import INPUT_MULTIPLIER, encode
from .layout import Blob
from .low_bit import coded_graph
from .lower import native_inputs
from .masks import check_exact
from .param import parse, render
from .pnnx import check_layers
from .products import NOTE, any_integers
from .slots import TAG_FP16, TAG_FP32, check_bin
from .steady_norms import with_steady_norms
from .sums import with_float32_sums
from .trace import TracedNcnn

_CHUNK: Final = 1 << 22  # elements cast and written at once: 16 MiB of float32


@dataclass(frozen=True)
class WriteNcnn(Stage[TargetModel], name="weights", version=11, tools=("numpy",)):
    """Stream the weights of `source` into the layout of `traced`.

    At "fp16", weights that have two or more dimensions in PyTorch are rounded to float16, as on every target, and
    stored so where ncnn reads a tag; it widens them when it loads. Its MemoryData (position embeddings) has none,
    and holds the rounded values as float32. Biases and norms stay float32. Integer schemes: see `low_bit`.
    """

    traced: TracedNcnn
    source: ComponentSource
    size: tuple[int, int]  # height, width in pixels: what the model's inputs are declared as
    plan: Plan
    quantized: QuantizedWeights | None = None

    runtime: ClassVar[str] = "ncnn"  # the ONNX targets have a stage of that name too

    def key(self) -> Mapping[str, object]:
        return {**super().key(), "ranges": self.plan.ranges.digest if self.plan.ranges else None}

    def run(self, into: Path) -> TargetModel:
        component = self.source.component
        param, weights = into / f"{component}.param", into / f"{component}.bin"
        stored = StoredWeights(self.source, self.plan, self.quantized)
        blobs = self.traced.blobs()
        stored.check(layout.expected_shapes(blobs))
        layers, contents = parse(self.traced.param.read_text()), blobs
        if not self.plan.is_float:
            layers, contents = coded_graph(layers, contents, self.plan.scheme)
        inputs = native_inputs(self.source, self.size)
        if role_of(component) in ("decoder", "encoder"):
            extents = {spec.name: (spec.shape[2], spec.shape[3]) for spec in inputs}
            layers, contents = with_steady_norms(layers, contents, extents)
        layers = with_float32_sums(layers, component)
        check_exact(layers, [spec.name for spec in inputs if spec.dtype == "int32"])
        param.write_text(render(layers))
        check_layers(param)
        with weights.open("wb") as stream, self.traced.literals.open("rb") as literals:
            _write(contents, stored, self.plan.ranges, stream, literals)
        written = parse(param.read_text())
        check_bin(written, weights)
        parameters = sum(blob.slot.elements for blob in blobs if blob.kind == layout.PARAMETER)
        return TargetModel(
            into,
            component,
            "ncnn",
            self.plan.label,
            (param.name, weights.name),
            inputs,
            output_specs(self.source, self.size),
            bits_per_weight=round(8 * weights.stat().st_size / parameters, 3),
            notes=(NOTE,) if any_integers(written) else (),
        )


def _write(
    blobs: tuple[Blob, ...],
    weights: StoredWeights,
    ranges: LayerRanges | None,
    stream: BinaryIO,
    literals: BinaryIO,
) -> None:
    entering = ranges.read("input") if ranges else {}
    for blob in blobs:
        if blob.kind not in (layout.PARAMETER, layout.ZEROS, layout.LITERAL):
            limits = entering.get(blob.name.rpartition(".")[0])
            if limits is None and blob.kind == INPUT_MULTIPLIER:
                raise ExportError(
                    f"{weights.component}: the input of {blob.name!r} has no calibrated range",
                    hint='keep its activations in float: a recipe rule with scheme = "w8c_afp"',
                )
            encode(stream, blob, weights.codes(blob.name), limits)
            continue
        rounded = blob.kind == layout.PARAMETER and weights.scheme(blob.name).name == "fp16"
        if blob.slot.tagged:
            stream.write(TAG_FP16 if rounded else TAG_FP32)
        for chunk in _chunks(blob, weights, literals):
            if rounded:
                chunk = chunk.astype(np.float16) if blob.slot.tagged else chunk  # exact: they are rounded already
            stream.write(chunk.tobytes())
        stream.write(bytes(-stream.tell() % 4))


def _chunks(blob: Blob, weights: StoredWeights, literals: BinaryIO) -> Iterator[NDArray[Any]]:
    """The float32 values of a blob in the order of the file."""
    if blob.kind == layout.ZEROS:
        yield np.zeros(blob.slot.elements, np.float32)
        return
    if blob.kind == layout.LITERAL:
        literals.seek(blob.offset)
        yield np.fromfile(literals, np.float32, blob.slot.elements)
        return
    flat = weights.read(blob.name).transpose(blob.axes).reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        yield flat[start : start + _CHUNK].astype(np.float32, copy=False)
