"""A graph of float32 -> one whose products are of float16, with float32 kept where float16 would cost or save nothing.

A walk from the inputs decides, node by node, in what its result is held:

- `PRODUCTS` (convolutions, matrix products) are of float16: they take the time, and ONNX Runtime has kernels for them
  on AArch64 processors with float16 instructions.
- `STEPS` (sums and products of two tensors) stay in what they are given: float32 spreads from an input of the model
  or from an operator that keeps it up to the next product, float16 from a product on.
- `MOVES` (reshaping, joining) carry either.
- Everything else stays float32: ONNX Runtime 1.32 has no float16 kernel for it and would put a Cast on either side
  (Softmax it would even take apart), and these are the operators that lose most: norms, softmax, sigmoid.

- Layers at the resolution of the latent stay float32 in a UNet or ControlNet: see `_finest`.

So a time embedding is float32 up to its first linear layer, since an input of the model is, and the sum that has a
mask of -3.4e38 is, since that number is no float16. Where the mode changes stands a Cast. Inputs and outputs of the
model keep their types. docs/decisions/0104 has what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ...checkpoints.weights import Weights
from ...quantize.cast import FLOAT16_MAX
from ...quantize.plan import Plan
from ...stages.artifacts import ComponentSource

HALVES: Final = 1
"""Raised by one with every change of these rules."""

PRODUCTS: Final = frozenset({"Conv", "Gemm", "MatMul"})
STEPS: Final = frozenset({"Add", "Div", "Erf", "Mul", "Sub"})
MOVES: Final = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
     "Unsqueeze"}
)  # fmt: skip
STORED: Final = ".fp16"
"""What the name of a weight that is stored in float16 ends with; a Cast gives it its own name (`export.onnx_model`)."""

_NORMAL: Final = 2.0**-14  # least normal float16


@dataclass(frozen=True, slots=True)
class Modules:
    """Modules of PyTorch that have weights, by whether their products are of float16."""

    halved: tuple[str, ...]
    kept: tuple[str, ...]

    def key(self) -> dict[str, object]:
        """For the key of a stage."""
        return {"rules": HALVES, "halved": list(self.halved), "kept": list(self.kept)}

    def keeps(self, module: str) -> bool:
        """Whether `module` stays float32: it is kept, or all weights in it, or around it if it has none, are."""
        while module:
            kept, halved = (
                any(path == module or path.startswith(f"{module}.") for path in paths)
                for paths in (self.kept, self.halved)
            )
            if kept or halved:
                return kept and not halved
            module = module.rpartition(".")[0]
        return False


def halve(model: Any, modules: Modules) -> int:
    """Rewrite `model`, an `onnx.ModelProto` with static shapes and without its external data, in place.

    Returns:
        How many products are of float16 now.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    halving = _Halving(inferred, modules)
    for node in model.graph.node:
        halving.take(node)
    halving.finish(model.graph.output)
    used = {name for node in halving.nodes for name in node.input}
    dropped = {node.output[0] for node in halving.nodes if _widens(node) and node.output[0] not in used}
    kept = [node for node in halving.nodes if node.output[0] not in dropped]
    for repeated, values in ((model.graph.node, kept), (model.graph.value_info, [])):
        del repeated[:]
        repeated.extend(values)
    return halving.products


def module_of(node: Any) -> str:
    """PyTorch's path of the module that an ONNX node came from, empty where it came from none."""
    return next((entry.value for entry in node.metadata_props if entry.key == "module"), "")


def _widens(node: Any) -> bool:
    return bool(node.op_type == "Cast" and node.input[0] == f"{node.output[0]}{STORED}")


def _finest(graph: Any) -> frozenset[str]:
    """What layers with weights put out at the resolution of the latent, in a graph that tells noise from a picture.

    At the last steps of a schedule nearly all of the latent is picture and the answer is the rest: it comes down from
    the first convolution and up to the last at that resolution, and an error there is as large as on any other way,
    but beside an answer of which a thousandth is in the input.
    """
    inputs = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    if not {"sample", "timestep"} <= set(inputs):
        return frozenset()
    height, width = inputs["sample"][2:]
    weights = {tensor.name for tensor in graph.initializer} | {n.output[0] for n in graph.node if _widens(n)}
    made = {n.output[0] for n in graph.node if n.op_type in PRODUCTS and any(name in weights for name in n.input)}
    found = set()
    for value in (*graph.value_info, *graph.output):
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.name in made and (shape[2:] == [height, width] or shape[1:-1] == [height * width]):
            found.add(value.name)
    return frozenset(found)


class _Halving:
    """The walk: `nodes` is the new graph so far."""

    def __init__(self, graph: Any, modules: Modules) -> None:
        from onnx import TensorProto

        self.nodes: list[Any] = []
        self._finest = _finest(graph)
        self.products = 0
        self._modules = modules
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        values = (*graph.input, *graph.value_info, *graph.output)
        self._floats = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
        self._floats |= {t.name for t in graph.initializer if t.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)}
        self._stored = {node.output[0] for node in graph.node if _widens(node)}
        self._half: set[str] = set()  # tensors of float16, by the names that they had in float32
        self._casts: dict[tuple[str, bool], str] = {}

    def take(self, node: Any) -> None:
        """Append `node`, with Casts before it where its inputs are of the other kind."""
        if _widens(node):
            self.nodes.append(node)
            return
        floats = [place for place, name in enumerate(node.input) if name in self._floats]
        half = self._is_half(node, [node.input[place] for place in floats])
        for place in floats:
            if node.op_type != "Cast":
                node.input[place] = self._as(node.input[place], half=half, node=node)
            elif node.input[place] in self._half:  # a Cast to an integer
                node.input[place] = self._as(node.input[place], half=False, node=node)
        self.nodes.append(node)
        if half:
            self._half |= set(node.output) & self._floats
            self.products += node.op_type in PRODUCTS

    def finish(self, outputs: Any) -> None:
        """Give the graph's outputs back their type and name."""
        from onnx import TensorProto, helper

        for output in outputs:
            if output.name in self._half:
                inner = f"{output.name}.half"
                for node in self.nodes:
                    for names in (node.input, node.output):
                        for place, name in enumerate(names):
                            if name == output.name:
                                names[place] = inner
                self.nodes.append(helper.make_node("Cast", [inner], [output.name], output.name, to=TensorProto.FLOAT))

    def _is_half(self, node: Any, floats: list[str]) -> bool:
        if not floats or node.output[0] in self._finest or self._modules.keeps(module_of(node)):
            return False
        if node.op_type in PRODUCTS:
            return all(self._fits(name) for name in floats)
        given = [name for name in floats if name not in self._constants and name not in self._stored]
        if node.op_type in STEPS:
            return bool(given) and all(name in self._half for name in given) and all(map(self._fits, floats))
        if node.op_type in MOVES:
            return any(name in self._half for name in given) if given else all(n in self._stored for n in floats)
        return False

    def _fits(self, name: str) -> bool:
        """Whether a constant, if it is one, keeps its bits as float16."""
        from onnx import TensorProto, numpy_helper

        tensor = self._constants.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return True
        sizes = np.abs(numpy_helper.to_array(tensor).astype(np.float64))
        return bool(np.all((sizes == 0) | (sizes >= _NORMAL) & (sizes <= FLOAT16_MAX)))

    def _as(self, name: str, *, half: bool, node: Any) -> str:
        """The name under which tensor `name` is of float16, or of float32."""
        from onnx import TensorProto, helper

        if half and name in self._stored:
            return f"{name}{STORED}"
        if half == (name in self._half):
            return name
        cast = f"{name}.half" if half else f"{name}.wide"
        if (name, half) not in self._casts:
            self._casts[name, half] = cast
            kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
            self.nodes.append(helper.make_node("Cast", [name], [cast], cast, to=kind))
            self.nodes[-1].metadata_props.extend(node.metadata_props)
        return cast


def halved_modules(source: ComponentSource, plan: Plan) -> Modules | None:
    """The modules of a component by what `plan` says of their weights; None where it computes none in float16."""
    weights = Weights(source)
    shapes = {name: weights.spec(name)[1] for name in weights.names()}
    halved = {
        name.rpartition(".")[0]: plan.scheme(name, shape).computes_half
        for name, shape in sorted(shapes.items())
        if len(shape) > 1
    }
    if not any(halved.values()):
        return None
    names = [tuple(module for module, half in halved.items() if half is each) for each in (True, False)]
    return Modules(*names)
