"""Parts of an `.onnx` model in ONNX Runtime: any tensors in, any tensors out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...stages.artifacts import TargetModel
from ...stages.errors import ToolCrashed, UsageError
from ..mapped import dropped_pages
from ..protocol import Array, Closing, Feeds
from ..taps import Node, Wiring, boundaries
from .external_data import read_graph
from .free_batch import BATCH
from .halves import module_of
from .optimum_outputs import SECOND_NAME
from .session import first_line, ort_errors, session_options

_MADE = ".made"  # what a tensor's own node computes, where others read a feed of that name


def onnx_file(model: TargetModel) -> Path:
    """The `.onnx` form of a model.

    Raises:
        UsageError: it has only the `.ort` form, whose graph ONNX Runtime does not take apart.
    """
    files = model.files if model.files[0].endswith(".onnx") else model.forms.get("onnx", ())
    if not files:
        raise UsageError(
            f"{model.component} has only the .ort form, which cannot be looked into",
            hint='convert with [target.ort] forms = ["onnx", "ort"]',
        )
    return model.folder / files[0]


def read_wiring(model: TargetModel) -> Wiring:
    """Nodes carry the module that they came from as metadata, from the export on."""
    graph = read_graph(onnx_file(model)).graph
    nodes = tuple(
        Node(node.op_type, module_of(node), tuple(node.input), tuple(node.output))
        for node in graph.node
        if node.name != SECOND_NAME
    )
    keys = boundaries(nodes, [spec.name for spec in model.inputs], [spec.name for spec in model.outputs])
    return Wiring(nodes, keys, streamed=True, shapes=_shapes(graph))


def _shapes(graph: Any) -> dict[str, tuple[int, ...]]:
    """The shapes that a graph states, for a batch of one."""
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        sizes = [1 if dim.dim_param == BATCH else dim.dim_value for dim in dims]
        if sizes and all(sizes):
            found[value.name] = tuple(sizes)
    return found


def _of_float16(model: Any) -> frozenset[str]:
    """Tensors of float16: they are fed and given out as float32."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    return frozenset(
        value.name for value in inferred.value_info if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    )


class OrtTaps(Closing):
    """Satisfies `TapSession`. Each run cuts the part that it needs out of the graph and loads the weights of that only.

    Raises:
        BundleError: the file is damaged.
    """

    def __init__(self, model: TargetModel, threads: int) -> None:
        self._file = onnx_file(model)
        self._model: Any = read_graph(self._file)
        self._threads = threads
        self._name = f"ort {model.component}"
        self._makers = {tensor: node for node in self._model.graph.node for tensor in node.output}
        self._constants = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._halves = _of_float16(self._model)
        self.partial_runs = 0

    def run(self, feeds: Feeds, wanted: Mapping[str, int]) -> Iterator[tuple[str, Array]]:
        import onnxruntime

        part = self._part(feeds, wanted)
        options = session_options(self._threads)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._file.parent))
        names = [f"{tensor}{_MADE}" if tensor in feeds else tensor for tensor in wanted]
        try:
            session = onnxruntime.InferenceSession(
                part.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            # as values of ONNX Runtime's: as arrays, all results would be copied before the first one is seen
            given = {entry.name: feeds[entry.name] for entry in session.get_inputs()}
            halves = {entry.name for entry in session.get_inputs() if entry.type == "tensor(float16)"}
            given |= {name: np.asarray(given[name], np.float16) for name in halves}
            values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}
            with dropped_pages(given.values()):
                results = session.run_with_ort_values(names, values)
        except ort_errors() as error:
            raise ToolCrashed(f"{self._name}, in part: {first_line(error)}") from None
        self.partial_runs += 1
        del session, given, values
        for tensor in wanted:
            array = results.pop(0).numpy()
            yield tensor, array.astype(np.float32) if array.dtype == np.float16 else array

    def _part(self, feeds: Feeds, wanted: Collection[str]) -> Any:
        """The part of the graph between `feeds` and `wanted`."""
        import onnx

        needed, open_ends = set(), []
        for tensor in wanted:
            if tensor not in self._makers:
                raise ToolCrashed(f"{self._name} has no tensor {tensor!r}")
            open_ends.append(self._makers[tensor])
        while open_ends:
            node = open_ends.pop()
            if id(node) in needed:
                continue
            needed.add(id(node))
            open_ends += [self._makers[name] for name in node.input if name in self._makers and name not in feeds]
        part = onnx.ModelProto()
        part.ir_version = self._model.ir_version
        part.opset_import.extend(self._model.opset_import)
        part.graph.name = "part"
        both = set(feeds) & set(wanted)
        for node in self._model.graph.node:
            if id(node) in needed:
                part.graph.node.append(node)
                renamed = part.graph.node[-1]
                for place, name in enumerate(renamed.output):
                    if name in both:
                        renamed.output[place] = f"{name}{_MADE}"
        read = {name for node in part.graph.node for name in node.input}
        part.graph.initializer.extend(self._constants[name] for name in sorted(read & set(self._constants)))
        for name in sorted(read & set(feeds)):
            kind = onnx.helper.np_dtype_to_tensor_dtype(np.asarray(feeds[name]).dtype)
            if name in self._halves:
                kind = onnx.TensorProto.FLOAT16
            part.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, np.shape(feeds[name])))
        for tensor in wanted:
            part.graph.output.add().name = f"{tensor}{_MADE}" if tensor in both else tensor
        return part

    def close(self) -> None:
        self._model = None
