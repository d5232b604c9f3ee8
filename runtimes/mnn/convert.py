"""ONNX -> MNN, one component at a time."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...stages.artifacts import OnnxModel, TargetModel, TensorSpec
from ...stages.errors import ToolCrashed
from ...stages.stage import Stage
from .. import registry
from ..isolation import open_isolated
from .graph import MnnGraph, write_mnn_graph
from .mnn_file import ExternalData, MnnFile
from .native import mnnconvert

# A flatbuffer ends at 2 GiB, and building one takes twice its size in memory.
EXTERNAL_ABOVE: Final = 2**29  # bytes of weights as stored
BITS: Final = {"fp32": 32.0, "fp16": 16.0}


@dataclass(frozen=True)
class BuildMnn(Stage[TargetModel], name="mnn", version=2, tools=("MNN", "onnx-ir", "flatbuffers")):
    """Canonical ONNX -> `<component>.mnn`, and `<component>.mnn.weight` for a large one, at the precision of the ONNX.

    "fp16" is the storage of weights; MNN decides at load time whether to compute in float16.
    """

    onnx: OnnxModel
    notes: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        return self.onnx.precision

    def run(self, into: Path) -> TargetModel:
        file = into / f"{self.onnx.component}.mnn"
        scratch = into / "scratch"
        scratch.mkdir()
        graph = write_mnn_graph(self.onnx, scratch)
        flags = ["--fp16"] if self.precision == "fp16" else []
        if sum(path.stat().st_size for path in self.onnx.folder.iterdir()) > EXTERNAL_ABOVE:
            flags.append("--saveExternalData")
        mnnconvert(
            ["-f", "ONNX", "--modelFile", str(graph.file), "--MNNModel", str(file), "--bizCode", "diffusette", *flags],
            scratch,
        )
        shutil.rmtree(scratch)
        MnnFile(file).check_weights()
        refuse_lost_weights(MnnFile(file), self.onnx)
        if self.precision == "fp16":
            MnnFile(file).store_as_float32(rounded_vectors(MnnFile(file), graph))
        MnnFile(file).stamp()
        onnx = self.onnx
        notes, bits = (*self.notes, *graph.notes), BITS[self.precision]
        return checked_model(MnnFile(file), onnx.component, onnx.precision, graph.inputs, onnx.outputs, bits, notes)


def refuse_lost_weights(built: MnnFile, onnx: OnnxModel) -> None:
    """Refuse a weight file with more layers of nothing but zeros than the ONNX has.

    The converter spills weights to a file in its folder, and reads them back. Of SDXL's UNet, it was seen to find
    zeros from some byte on, and to claim success: most likely the disk was full, which it does not look at.

    Raises:
        ToolCrashed: says how many, and the first.
    """
    empty = [data.name for data in built.external() if data.sizes and _is_zero(built.weight_file, data)]
    if empty and len(empty) > (known := _zero_weights(onnx)):
        raise ToolCrashed(
            f"mnnconvert wrote zeros for the weights of {len(empty)} layers, {known} of which have none but zeros; "
            f"the first is {empty[0]!r}",
            hint="it says nothing when the disk is full: free some space, then convert again",
        )


def _is_zero(file: Path, data: ExternalData) -> bool:
    return not np.memmap(file, np.uint8, "r", offset=data.start, shape=(data.sizes[0],)).any()


def _zero_weights(onnx: OnnxModel) -> int:
    """How many of the ONNX's weights are nothing but zeros; they are read one by one."""
    import onnx as library
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    count = 0
    for tensor in library.load(str(onnx.file), load_external_data=False).graph.initializer:
        if uses_external_data(tensor):
            load_external_data_for_tensor(tensor, str(onnx.folder))
        count += len(tensor.dims) > 1 and not library.numpy_helper.to_array(tensor).any()
        tensor.ClearField("raw_data")
    return count


def checked_model(
    built: MnnFile,
    component: str,
    precision: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    bits: float,
    notes: tuple[str, ...] = (),
) -> TargetModel:
    """The model of a finished file, once MNN has loaded it.

    Raises:
        ToolCrashed: the converter left something out, or its inputs and outputs are others.
    """
    if unknown := built.unconverted():
        raise ToolCrashed(f"mnnconvert left operators that MNN cannot run: {', '.join(unknown)}")
    if set(built.inputs) != set(inputs) or built.outputs != tuple(spec.name for spec in outputs):
        raise ToolCrashed(
            f"{built.path.name} takes {built.inputs} and gives {built.outputs}, not {inputs} and {outputs}"
        )
    files = [built.path, built.weight_file] if built.weight_bytes else [built.path]
    model = TargetModel(
        folder=built.path.parent,
        component=component,
        target="mnn",
        precision=precision,
        files=tuple(path.name for path in files),
        inputs=inputs,
        outputs=outputs,
        bits_per_weight=bits,
        notes=notes,
    )
    open_isolated(f"{registry.__name__}:open_model", model, threads=1).close()  # so MNN can load it
    return model


def rounded_vectors(built: MnnFile, graph: MnnGraph) -> dict[str, NDArray[np.float32]]:
    """The exact values of the constants that `--fp16` has cut to float16.

    The flag means every constant, also norm scales, biases and scalars such as 1/sqrt(d), and it cuts towards zero
    where IEEE 754 rounds to nearest. Weights come to it as exact float16 values and lose nothing; for the rest it
    took the demo's UNet from 77 to 65 dB.

    Raises:
        ToolCrashed: a cut constant is not one of the graph's, or not the same.
    """
    exact = {}
    for name, half in built.half_constants().items():
        if name in graph.halves:
            continue
        value = graph.vectors.get(name)
        limits = np.finfo(np.float16)
        if value is None or value.size != half.size:
            raise ToolCrashed(f"{built.path.name}: MNN rounded a constant {name!r} that the graph does not have")
        if not np.allclose(half, np.clip(value.ravel(), limits.min, limits.max), rtol=2**-10, atol=2**-24):
            raise ToolCrashed(f"{built.path.name}: MNN's constant {name!r} is not the graph's")
        exact[name] = value
    return exact
