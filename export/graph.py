"""The structure of a component as ONNX: a small file in which the weights are named inputs, not bytes.

The module is built on the meta device, so a graph costs its nodes and not its weights: no gigabyte is read,
and fine-tunes of one architecture share one graph. `weights.json` beside it tells which checkpoint tensor,
in which layout, each weight input stands for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import rfc8785

from ..checkpoints.config import architecture
from ..stages.artifacts import ComponentSource, TensorSpec
from ..stages.errors import ExportError
from ..stages.stage import Stage

OPSET: Final = 18  # newest that ONNX Runtime and MNN both run without rewriting: docs/decisions/0002


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """One weight input of a graph: the tensor `source` of the checkpoint, permuted, then reshaped."""

    name: str  # PyTorch's parameter path, also the name of the ONNX input or initializer
    source: str  # name in the state dict; differs from `name` only when one tensor is used in two layouts
    stored: tuple[int, ...]  # shape in the checkpoint
    permute: tuple[int, ...] | None
    shape: tuple[int, ...]  # as the graph wants it


@dataclass(frozen=True, slots=True)
class Graph:
    """An exported component on disk: `graph.onnx` without weights, and `weights.json`."""

    folder: Path
    component: str
    inputs: tuple[TensorSpec, ...]  # activations only
    outputs: tuple[TensorSpec, ...]
    digest: str = ""

    @property
    def file(self) -> Path:
        return self.folder / "graph.onnx"

    def slots(self) -> tuple[WeightSlot, ...]:
        """The weight inputs, in the order of the graph."""
        rows = json.loads((self.folder / "weights.json").read_text())
        return tuple(
            WeightSlot(
                r["name"],
                r["source"],
                tuple(r["stored"]),
                tuple(r["permute"]) if r["permute"] else None,
                tuple(r["shape"]),
            )
            for r in rows
        )


def write_slots(slots: tuple[WeightSlot, ...], folder: Path) -> None:
    """Write `weights.json` of a graph folder."""
    (folder / "weights.json").write_bytes(rfc8785.dumps([asdict(slot) for slot in slots]))


@dataclass(frozen=True)
class ExportGraph(
    Stage[Graph], name="export", version=1, tools=("torch", "diffusers", "transformers", "onnxscript", "onnx-ir")
):
    """PyTorch -> ONNX structure. The key holds the architecture and the size, never the weights."""

    component: str
    family: str
    config: Mapping[str, Any]
    size: tuple[int, int]  # height, width in pixels

    def key(self) -> Mapping[str, object]:
        return {"component": self.component, "config": architecture(self.config), "size": list(self.size)}

    def run(self, into: Path) -> Graph:
        import onnx_ir as ir

        source = ComponentSource(self.component, self.family, self.config, (), "", 0, "float32")
        model = _trace(source, self.size)
        slots = _fold_layouts(model, _detach_weights(model))
        _name_modules(model)
        model.producer_name, model.producer_version, model.doc_string = "diffusette", None, None
        ir.save(model, into / "graph.onnx")
        write_slots(slots, into)
        from .contract import input_specs, output_specs

        return Graph(into, self.component, input_specs(source, self.size), output_specs(source, self.size))


def _trace(source: ComponentSource, size: tuple[int, int]) -> Any:
    import logging
    import warnings

    import torch

    from ..checkpoints.network import build
    from .contract import input_specs, output_specs
    from .modules import wrap

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # says that torchvision is absent, four times
    module = wrap(source, build(source))
    inputs, outputs = input_specs(source, size), output_specs(source, size)
    args = tuple(torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch and copyreg; failures raise
        program = torch.onnx.export(
            module,
            args,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # the optimiser cannot read meta constants; it runs after they are detached
            verbose=False,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
        )
    if program is None:
        raise ExportError(f"torch.onnx.export returned nothing for {source.component}", hint="report this as a bug")
    traced = tuple((v.name, tuple(v.shape.numpy() if v.shape else ())) for v in program.model.graph.outputs)
    expected = tuple((spec.name, spec.shape) for spec in outputs)
    if traced != expected:
        raise ExportError(f"{source.component}: exported outputs {traced} are not the expected {expected}")
    return program.model


def _detach_weights(model: Any) -> dict[str, tuple[int, ...]]:
    """Turn every meta initializer into a graph input, optimise what is left, return name -> shape."""
    import torch
    from onnxscript import optimizer

    graph, weights = model.graph, {}
    for value in list(graph.initializers.values()):
        raw = getattr(value.const_value, "raw", None)
        if not (isinstance(raw, torch.Tensor) and raw.device.type == "meta"):
            continue
        del graph.initializers[value.name]
        value.const_value = None
        value.name = value.name.removeprefix("m.")
        weights[value.name] = tuple(int(d) for d in value.shape)
        graph.inputs.append(value)
    optimizer.optimize(model)
    return weights


def _fold_layouts(model: Any, weights: Mapping[str, tuple[int, ...]]) -> tuple[WeightSlot, ...]:
    """Move Transpose and Unsqueeze of a weight out of the graph into its slot.

    A Linear is exported as MatMul(x, Transpose(W)) and a GroupNorm unsqueezes its scale: done once while the
    weights are written instead of at every load on the phone.
    """
    graph, slots = model.graph, []
    for value in [v for v in graph.inputs if v.name in weights]:
        plain = WeightSlot(value.name, value.name, weights[value.name], None, weights[value.name])
        layouts: dict[tuple[Any, ...], Any] = {}
        for node, index in tuple(value.uses()):
            folded = _folded(node, plain)
            if folded is None:
                key: tuple[Any, ...] = (None, plain.shape)
                layouts.setdefault(key, []).append((node, index))
                continue
            layouts.setdefault((folded.permute, folded.shape), []).append((node, None))
        for number, (layout, uses) in enumerate(layouts.items()):
            name = plain.name if number == 0 else f"{plain.name}.layout{number}"
            slots.append(WeightSlot(name, plain.name, plain.stored, layout[0], layout[1]))
            _use_layout(graph, value, slots[-1], uses, first=number == 0)
        if not layouts:
            graph.inputs.remove(value)  # the graph does not need this weight
    return tuple(slots)


def _folded(node: Any, slot: WeightSlot) -> WeightSlot | None:
    if node.op_type == "Transpose":
        permute = tuple(node.attributes["perm"].as_ints())
        return replace(slot, permute=permute, shape=tuple(slot.shape[axis] for axis in permute))
    if node.op_type == "Unsqueeze" and node.inputs[1].const_value is not None:
        shape = list(slot.shape)
        rank = len(shape) + len(node.inputs[1].const_value.numpy())
        for axis in sorted(int(a) % rank for a in node.inputs[1].const_value.numpy()):
            shape.insert(axis, 1)
        return replace(slot, shape=tuple(shape))
    return None


def _use_layout(graph: Any, value: Any, slot: WeightSlot, uses: Any, *, first: bool) -> None:
    """Let `uses` read one graph input of the slot's layout; nodes that made that layout disappear."""
    import onnx_ir as ir

    if first:
        target = value
        target.shape = ir.Shape(slot.shape)
    else:
        target = ir.Value(name=slot.name, shape=ir.Shape(slot.shape), type=value.type)
        graph.inputs.append(target)
    for node, index in uses:
        if index is not None:
            node.replace_input_with(index, target)
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], target)
        graph.remove(node, safe=True)


def _name_modules(model: Any) -> None:
    """Keep of each node's metadata only the PyTorch module it came from.

    torch writes stack traces with local paths and a list of scopes such as `['', 'm', 'm.conv_in', 'conv2d']`.
    """
    import ast

    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
        path = [scope for scope in ast.literal_eval(scopes)[:-1] if scope.startswith("m.")]
        node.metadata_props.clear()
        if path:
            node.metadata_props["module"] = path[-1].removeprefix("m.")
        node.doc_string = None
    for value in model.graph.inputs:
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        for output in node.outputs:
            output.metadata_props.clear()
