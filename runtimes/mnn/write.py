"""A checkpoint's weights into the places that a learned `.mnn` has for them, one tensor in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from ...quantize.codes_file import QuantizedWeights
from ...quantize.plan import Plan
from ...quantize.stored_weights import ApartWeights, StoredWeights
from ...stages.artifacts import ComponentSource, TargetModel
from ...stages.stage import Stage
from .coded import setting_note
from .codes import encode
from .convert import BITS, checked_model
from .flat import Values, pack
from .half import cut_to_half
from .mnn_file import MnnFile
from .narrow import LearnedMnn
from .schema import MAINS
from .weight_file import FLOATS, HALVES
from .widen import FLOAT, HALF, INT32, Operation, Piece

_APART_ABOVE: Final = 1024  # elements: `RemoveAndStoreParam`, tools/converter/source/common, MNN 3.6.1
_SMALLEST: Final = np.finfo(np.float32).tiny  # below it MNN's converter writes zeros into its convolutions


@dataclass(frozen=True)
class WriteMnn(Stage[TargetModel], name="mnn", version=2, tools=("MNN", "numpy", "flatbuffers")):
    """`<component>.mnn` and `<component>.mnn.weight`, to the byte those of `BuildMnn` and `BuildCodedMnn`."""

    learned: LearnedMnn
    source: ComponentSource
    plan: Plan
    quantized: QuantizedWeights | None = None

    def run(self, into: Path) -> TargetModel:
        file = into / f"{self.source.component}.mnn"
        stored = ApartWeights(self.source, self.plan, self.quantized)
        net, operations, shapes = self.learned.model()
        stored.check(shapes)
        cut: dict[str, NDArray[np.float32]] = {}
        with file.with_name(f"{file.name}.weight").open("wb") as weights:
            operators = [_filled(operation, stored, weights, cut) for operation in operations]
        file.write_bytes(pack({**net, "oplists": operators}))
        del operators
        MnnFile(file).check_weights()
        if cut:
            MnnFile(file).store_as_float32(cut)
        MnnFile(file).stamp()
        built, form = MnnFile(file), self.learned
        numbers = sum(prod(shape) for shape in stored.shapes().values())
        bits = BITS[self.plan.label] if self.plan.is_float else round(8 * built.weight_bytes / numbers, 3)
        notes = () if self.plan.is_float else (setting_note(self.plan),)
        return checked_model(built, form.component, self.plan.label, form.inputs, form.outputs, bits, notes)


def _filled(
    operation: Operation, stored: StoredWeights, weights: BinaryIO, cut: dict[str, NDArray[np.float32]]
) -> Values:
    """An operation with its weights: appended to `weights`, or inside. `cut` gets what is no float16 and was cut."""
    op: Values = operation["op"]
    kind, main = MAINS.get(op["main_type"]), op.get("main", {})
    if kind == "Blob":
        return {**op, "main": _constant(op["name"], main, operation["pieces"], stored, weights, cut)}
    if kind == "Convolution2D" and operation["pieces"]:
        return {**op, "main": _convolution(main, operation["pieces"], stored, weights)}
    if kind == "LayerNorm" and operation["pieces"]:
        start = weights.tell()
        sizes = [weights.write(_read(piece, stored).tobytes()) for piece in operation["pieces"]]
        return {**op, "main": {**main, "external": [start, *sizes]}}
    return op


def _convolution(main: Values, pieces: list[Piece], stored: StoredWeights, weights: BinaryIO) -> Values:
    weight, bias = pieces
    start, name = weights.tell(), weight["parameter"]
    outputs, quantised = main["common"]["outputCount"], main.get("quanParameter")
    scheme, sizes = stored.scheme(name), []
    if not scheme.is_float:
        codes = stored.codes(name)
        assert quantised is not None
        quantised = {**quantised, "aMaxOrBits": scheme.weight_bits}
        sizes = [weights.write(encode(codes, scheme.weight_bits)), weights.write(codes.scales.tobytes())]
    else:
        values = _read(weight, stored)
        if quantised is None or quantised["type"] == HALVES:
            values = np.where(np.abs(values) < _SMALLEST, np.float32(0), values)
        half = quantised is not None and scheme.name == "fp16"
        sizes = [weights.write(values.astype(np.float16 if half else np.float32, copy=False).tobytes())]
        if quantised is not None:
            quantised = {**quantised, "type": HALVES if half else FLOATS}
            sizes.append(0)
    sizes.append(weights.write(_read(bias, stored, outputs).tobytes()))
    if quantised is None:
        return {**main, "external": [start, *sizes]}
    return {**main, "quanParameter": quantised, "external": [start, *sizes, 0]}  # no index of a sparse weight


def _constant(
    name: str,
    main: Values,
    pieces: list[Piece],
    stored: StoredWeights,
    weights: BinaryIO,
    cut: dict[str, NDArray[np.float32]],
) -> Values:
    table, kind = {key: value for key, value in main.items() if key != "values"}, main["dataType"]
    values: NDArray[Any] = (
        _read(pieces[0], stored) if pieces else np.array(main["values"], np.int32 if kind == INT32 else np.float32)
    )
    if kind == HALF:
        if not (pieces and stored.scheme(pieces[0]["parameter"]).name == "fp16"):
            cut[name] = values
        return {**table, "uint8s": cut_to_half(values).view(np.uint8)}
    if values.size > _APART_ABOVE:
        return {**table, "external": [weights.tell(), weights.write(values.tobytes())]}
    return {**table, "float32s" if kind == FLOAT else "int32s": values}


def _read(piece: Piece, stored: StoredWeights, zeros: int = 0) -> NDArray[np.float32]:
    """A piece in the order of the file, flat."""
    if "parameter" not in piece:
        return np.zeros(zeros, np.float32)
    return np.ascontiguousarray(stored.read(piece["parameter"]).transpose(piece["axes"]), np.float32).reshape(-1)
