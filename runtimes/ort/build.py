"""Canonical ONNX -> what ONNX Runtime loads: optimum's `.onnx` layout, and the mobile `.ort` form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...pipeline.artifacts import OnnxModel, TargetModel
from ...pipeline.disk import copy_file
from .external_data import data_files, read_graph, weight_bits
from .free_batch import free_batch
from .mobile import OPERATORS_FILE, ORT_FILE, why_absent, write_ort

FORMS = ("onnx", "ort")


@dataclass(frozen=True)
class BuildOrt:
    """`<component>/model.onnx` with a free batch, `model.onnx_data` beside it, and `model.ort` if it was asked for.

    The `.ort` form keeps the batch of 1, so that a phone can plan its memory ahead. Weights are copied as a file:
    no tensor is read, except by ONNX Runtime itself while it writes the `.ort` form.
    """

    onnx: OnnxModel
    forms: tuple[str, ...] = FORMS

    name: ClassVar[str] = "build-ort"
    version: ClassVar[int] = 1
    tools: ClassVar[tuple[str, ...]] = ("onnx", "onnx-ir", "onnxruntime")
    output: ClassVar[type] = TargetModel

    @property
    def precision(self) -> str:
        return self.onnx.precision

    def key(self) -> Mapping[str, object]:
        return {"onnx": self.onnx.digest, "forms": list(self.forms)}

    def run(self, into: Path) -> TargetModel:
        component = self.onnx.component
        folder = into / component
        folder.mkdir()
        static = read_graph(self.onnx.file)
        bits, numbers = weight_bits(static)
        files = [f"{component}/model.onnx"]
        for name in data_files(static, self.onnx.file):
            # a copy, not a hard link: onnx refuses external data that has a second name
            copy_file(self.onnx.folder / name, folder / name)
            files.append(f"{component}/{name}")
        write_batched(static, folder / "model.onnx")

        forms: dict[str, tuple[str, ...]] = {}
        note = why_absent(bits // 8, self.onnx.file.stat().st_size) if "ort" in self.forms else ""
        if "ort" in self.forms and not note:
            write_ort(self.onnx.file, folder, bits // 8)
            forms["ort"] = (f"{component}/{ORT_FILE}", f"{component}/{OPERATORS_FILE}")
        return TargetModel(
            folder=into,
            component=component,
            target="ort",
            precision=self.onnx.precision,
            files=tuple(files),
            inputs=self.onnx.inputs,
            outputs=self.onnx.outputs,
            bits_per_weight=round(bits / numbers, 3),
            forms=forms,
            notes=(note,) if note else (),
        )


def write_batched(static: Any, file: Path) -> None:
    """Free the batch of `static` (an `onnx.ModelProto` without its weights) and write it to `file`."""
    import onnx
    import onnx_ir as ir

    inferred = onnx.shape_inference.infer_shapes(static, strict_mode=True, data_prop=True)
    model = ir.from_proto(inferred)
    free_batch(model)
    onnx.save(ir.to_proto(model), str(file))
