"""Canonical ONNX -> what ONNX Runtime loads: optimum's `.onnx` layout, and the mobile `.ort` form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...stages.artifacts import OnnxModel, TargetModel
from ...stages.disk import copy_file
from ...stages.onnx_file import read_onnx
from ...stages.stage import Stage
from ..steady_norms import steady_norms
from .external_data import data_files, read_graph, weight_bits
from .free_batch import free_batch
from .halves import Modules, halve
from .mobile import why_absent, write_ort
from .optimum_outputs import add_second_names

FORMS: Final = ("onnx", "ort")
HALF_NOTE: Final = (
    "no .ort form: ONNX Runtime fixes in it which operators run in float16 by the processor that writes it, and "
    "here that is none; use the .onnx form"
)


@dataclass(frozen=True)
class BuildOrt(Stage[TargetModel], name="build-ort", version=4, tools=("onnx", "onnx-ir", "onnxruntime")):
    """`<component>/model.onnx` with a free batch and `model.onnx_data` beside it; `<component>/model.ort`.

    The `.ort` form keeps the batch of 1, so that a phone can plan its memory ahead. Weights are copied as a file:
    no tensor is read, except by ONNX Runtime itself while it writes the `.ort` form of float32. A model too large for
    `.ort` has `.onnx`, whatever `forms` says, and a note.
    """

    onnx: OnnxModel
    forms: tuple[str, ...] = FORMS  # the first that exists is what a session loads
    modules: Modules | None = None  # whose products are computed in float16; None: no module's

    @property
    def precision(self) -> str:
        return self.onnx.precision

    def run(self, into: Path) -> TargetModel:
        import onnx

        component, source = self.onnx.component, self.onnx.file
        folder = into / component
        folder.mkdir()
        static, stated = read_graph(source), read_onnx(source)
        bits, numbers = weight_bits(stated)
        data = data_files(stated, source)
        for file in data:
            # a copy, not a hard link: onnx refuses external data that has a second name
            copy_file(source.parent / file, folder / file)
        if self.modules:
            halve(static, self.modules)
        steady_norms(static)
        staged = folder / "static.onnx"
        onnx.save(static, str(staged))
        note = self._why_no_ort(bits // 8, source.stat().st_size) if "ort" in self.forms else ""
        written: dict[str, tuple[str, ...]] = {}
        for form in self.forms:
            if form == "onnx" or note:
                write_batched(static, folder / source.name)
                written["onnx"] = (source.name, *data)
            else:
                written["ort"] = write_ort(staged, folder, bits // 8)
            if note:
                break
        for file in (staged.name, *(data if "onnx" not in written else ())):
            (folder / file).unlink()
        files = {form: tuple(f"{component}/{name}" for name in names) for form, names in written.items()}
        first = next(iter(files))
        return TargetModel(
            folder=into,
            component=component,
            target="ort",
            precision=self.onnx.precision,
            files=files.pop(first),
            inputs=self.onnx.inputs,
            outputs=self.onnx.outputs,
            bits_per_weight=round(bits / numbers, 3),
            forms=files,
            notes=(note,) if note else (),
        )

    def _why_no_ort(self, weight_bytes: int, graph_bytes: int) -> str:
        return HALF_NOTE if self.modules else why_absent(weight_bytes, graph_bytes)


def write_batched(static: Any, file: Path) -> None:
    """Free the batch of `static` (an `onnx.ModelProto` without weights), add optimum's names, write it to `file`."""
    import onnx
    import onnx_ir as ir

    inferred = onnx.shape_inference.infer_shapes(static, strict_mode=True, data_prop=True)
    model = ir.from_proto(inferred)
    free_batch(model)
    batched = ir.to_proto(model)
    add_second_names(batched)
    onnx.save(batched, str(file))
