"""Graph + integer codes -> what ONNX Runtime loads. Weights stream; the graph is rewritten while it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from ...export.graph import Graph, WeightSlot
from ...quantize.codes_file import QuantizedWeights
from ...quantize.onnx_model import DATA_FILE
from ...quantize.plan import Plan
from ...quantize.stored_weights import StoredWeights
from ...stages.artifacts import ComponentSource, TargetModel
from ...stages.stage import Stage
from ..steady_norms import steady_norms
from .build import FORMS, write_batched
from .mobile import why_absent, write_ort
from .packed import Packed
from .packing import apply, pack
from .static_products import NOTE, static_products

_INLINE_BELOW: Final = 1024  # bytes, as in quantize/onnx_model.py
_ALIGNMENT: Final = 64  # bytes: a cache line. 4096, which float weights have, would be 3 % of a small model in codes


@dataclass(frozen=True)
class BuildCoded(Stage[TargetModel], name="build-ort", version=7, tools=("onnx", "onnx-ir", "onnxruntime", "numpy")):
    """`<component>/model.onnx` with `model.onnx_data`, and `model.ort`, of a plan that has integer codes.

    The graph is made ready (steady sums, free batch) with placeholders for weights, then each weight is replaced by
    its codes and what widens them: the rules of `free_batch` need not know of them.
    """

    graph: Graph
    source: ComponentSource
    plan: Plan
    quantized: QuantizedWeights | None
    forms: tuple[str, ...] = FORMS

    def key(self) -> Mapping[str, object]:
        return {**super().key(), "ranges": self.plan.ranges.digest if self.plan.ranges else None}

    def run(self, into: Path) -> TargetModel:
        import onnx

        component = self.graph.component
        folder = into / component
        folder.mkdir()
        slots = self.graph.slots()
        static = with_placeholders(onnx.load(str(self.graph.file)), slots)
        steady_norms(static)
        onnx_file, staged = folder / "model.onnx", folder / "static.onnx"
        write_batched(static, onnx_file)
        batched = onnx.load(str(onnx_file), load_external_data=False)
        weights = StoredWeights(self.source, self.plan, self.quantized)
        weights.check({slot.source: slot.stored for slot in slots})
        with (folder / DATA_FILE).open("wb") as data:
            writer = _Writer(data)
            packer = _Packer(weights, static, slots, writer)
            packings = {slot.name: packer.packed(slot) for slot in slots}
        for model, file in ((static, staged), (batched, onnx_file)):
            apply(model, packings)
            del model.graph.value_info[:]
            onnx.save(model, str(file))
            onnx.checker.check_model(str(file))
        numbers = sum(prod(slot.stored) for slot in slots)
        return self._finished(into, staged, writer.bytes, numbers)

    def _finished(self, into: Path, staged: Path, stored: int, numbers: int) -> TargetModel:
        folder = staged.parent
        note = why_absent(stored, staged.stat().st_size) if "ort" in self.forms else ""
        calibrated = (NOTE,) if self.plan.ranges else ()
        written: dict[str, tuple[str, ...]] = {}
        for form in self.forms:
            if form == "onnx" or note:
                written["onnx"] = ("model.onnx", DATA_FILE)
            else:
                written["ort"] = write_ort(staged, folder, stored)
            if note:
                break
        for file in (staged.name, *(() if "onnx" in written else ("model.onnx", DATA_FILE))):
            (folder / file).unlink()
        files = {form: tuple(f"{folder.name}/{name}" for name in names) for form, names in written.items()}
        first = next(iter(files))
        return TargetModel(
            folder=into,
            component=self.graph.component,
            target="ort",
            precision=self.plan.label,
            files=files.pop(first),
            inputs=self.graph.inputs,
            outputs=self.graph.outputs,
            bits_per_weight=round(8 * stored / numbers, 3),
            forms=files,
            notes=(*calibrated, note) if note else calibrated,
        )


class _Writer:
    """Writes arrays behind each other into the external data; counts what weights take, without alignment."""

    def __init__(self, data: BinaryIO) -> None:
        self._data = data
        self.bytes = 0

    def store(self, name: str, array: NDArray[Any], kind: str) -> Any:
        """The initializer of `array`, whose elements have `kind`, ONNX's name of a dtype."""
        from onnx import TensorProto

        tensor = TensorProto(name=name, dims=array.shape, data_type=TensorProto.DataType.Value(kind))
        flat = np.ascontiguousarray(array).reshape(-1)
        if kind != "INT64":  # shapes are no weights
            self.bytes += flat.nbytes
        if flat.nbytes < _INLINE_BELOW:
            tensor.raw_data = flat.tobytes()
            return tensor
        self._data.write(bytes(-self._data.tell() % _ALIGNMENT))
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": DATA_FILE, "offset": self._data.tell(), "length": flat.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(flat.data)
        return tensor


def with_placeholders(model: Any, slots: tuple[WeightSlot, ...]) -> Any:
    """Turn the weight inputs of `model` into initializers whose values lie nowhere: enough to infer shapes."""
    from onnx import TensorProto

    names = {slot.name for slot in slots}
    kept = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for slot in slots:
        tensor = TensorProto(name=slot.name, dims=slot.shape, data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="nowhere")
        model.graph.initializer.append(tensor)
    return model


class _Packer:
    """Packs one weight after the other for the nodes of `model` that use it."""

    def __init__(self, weights: StoredWeights, model: Any, slots: tuple[WeightSlot, ...], writer: _Writer) -> None:
        self._weights, self._writer = weights, writer
        self._slots = {slot.name: slot for slot in slots}
        self._uses: dict[str, list[tuple[Any, int]]] = {}
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                self._uses.setdefault(name, []).append((node, place))
        ranges = weights.plan.ranges
        self._entering = ranges.read("input") if ranges else {}
        self._leaving = ranges.read("output") if ranges else {}

    def packed(self, slot: WeightSlot) -> Packed:
        scheme, uses = self._weights.scheme(slot.source), self._uses.get(slot.name, [])
        if self._is_static(slot):
            module, codes = slot.source.removesuffix(".weight"), self._weights.codes(slot.source)
            entering, leaving = self._entering[module], self._leaving.get(module)
            return static_products(slot, codes, entering, leaving, uses, self._writer.store, self._bias)
        if not scheme.is_float:
            return pack(slot, self._weights.codes(slot.source), scheme, uses, self._writer.store)
        if uses and all(node.op_type == "Conv" and place == 2 and self._feeds_static(node) for node, place in uses):
            return Packed()  # the convolutions hold it in int32
        return self._float(slot, half=scheme.name == "fp16")

    def _is_static(self, slot: WeightSlot) -> bool:
        """Whether the activations of a weight's layer are rounded over a calibrated range; an embedding has none."""
        scheme = self._weights.scheme(slot.source)
        return scheme.activation_bits == 8 and slot.source.removesuffix(".weight") in self._entering

    def _feeds_static(self, convolution: Any) -> bool:
        return self._is_static(self._slots[convolution.input[1]])

    def _bias(self, name: str) -> NDArray[np.float32]:
        return self._weights.read(self._slots[name].source)

    def _float(self, slot: WeightSlot, *, half: bool) -> Packed:
        from onnx import TensorProto, helper

        array = self._weights.read(slot.source)
        if slot.permute:
            array = array.transpose(slot.permute)
        array = array.reshape(slot.shape)
        if not half:
            return Packed([self._writer.store(slot.name, array, "FLOAT")])
        # exact: they are rounded already
        tensor = self._writer.store(f"{slot.name}.fp16", array.astype(np.float16), "FLOAT16")
        cast = helper.make_node("Cast", [tensor.name], [slot.name], f"{slot.name}.cast", to=TensorProto.FLOAT)
        return Packed([tensor], [cast])
