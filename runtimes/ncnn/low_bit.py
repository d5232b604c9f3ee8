"""An ncnn graph whose weights are integer codes: layers around the codes make weights of them.

Every form computes with exactly the dequantised values (tests compare them bit by bit with Codes). What makes a weight
of codes does so in float32 whatever an app's options are (`masks.EXACT`); the layer that uses it obeys them.

- Convolution, 8 bits an output channel: codebook -> Convolution -> Scale. As fast as float32, and as large in memory.
- Linear layers, attention, 4 bits, groups, small convolutions: MemoryData of bytes -> Cast -> (unpack) -> scales ->
  Gemm or Convolution of computed weights. Bytes are all that stays in memory; unpacking is paid on every run.
- A low-rank branch: two MemoryData of float16 -> Gemm, added to the weight, which is computed anyway.
- MultiHeadAttention, which takes no computed weights, becomes four Gemm and an SDPA.
- Embed: a codebook of codes, and an Embed of scales, multiplied.

Schemes with activations of 8 bits multiply integers instead: `products.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod, sqrt
from typing import Final

from ...quantize.scheme import Scheme
from ...stages.errors import ExportError
from ..nibbles import are_halved
from . import products
from .codes import BOOK, BOOK_SCALES, CODES, DOWN, NIBBLE_BOOK, NIBBLES, SCALES, UP
from .layout import PARAMETER, Blob, Written, is_transposed
from .masks import EXACT, KEY
from .param import Layer

Schemes = Callable[[str, Sequence[int]], Scheme]  # of a parameter's name and shape

CODED_LAYERS: Final = ("Cast", "Scale")  # one is in every graph with codes, none in pnnx's graphs of these models

_INT8, _FLOAT32 = "3", "1"  # of Cast
_ADD, _SUB, _MUL = "0", "1", "2"  # of BinaryOp
_FLOOR: Final = "2"  # of UnaryOp
_WORTH_A_BOOK: Final = 2**15  # weights: a codebook has 1 KiB, so that it stays within 3 % of them
# Parameters that pnnx does not write today and that the code below would drop: fused activations, a cache of keys.
_UNKNOWN: Final = {"Convolution": 9, "InnerProduct": 9, "MultiHeadAttention": 7}


def coded_graph(
    layers: Iterable[Layer], blobs: Iterable[Blob], schemes: Schemes
) -> tuple[tuple[Layer, ...], tuple[Blob, ...]]:
    """The graph and the contents of its `.bin` for weights that `schemes` stores as codes; all else is as it was.

    Raises:
        ExportError: a layer is of a kind that this does not know.
    """
    graph = Graph(schemes=schemes)
    contents: dict[str, dict[str, Blob]] = {}
    for blob in blobs:
        contents.setdefault(blob.slot.layer, {})[blob.slot.role] = blob
    for layer in layers:
        held = contents.get(layer.name, {})
        if not any(graph.is_coded(blob) for blob in held.values()):
            graph.emit(layer, *held.values())
            continue
        write = _WRITERS.get(layer.type)
        if write is None or layer.number(_UNKNOWN.get(layer.type, -1)):
            raise ExportError(
                f"ncnn's {layer.type} {layer.name} cannot have its weights as integers",
                hint='keep it in float: a recipe rule for its module with scheme = "fp16"',
            )
        write(graph, layer, held)
    return tuple(graph.layers), tuple(graph.blobs)


@dataclass
class Graph(Written):
    """A graph in the making whose weights `schemes` stores."""

    schemes: Schemes = field(kw_only=True)

    def is_coded(self, blob: Blob) -> bool:
        return blob.kind == PARAMETER and not self.schemes(blob.name, blob.shape).is_float

    def rounds_inputs(self, weight: Blob) -> bool:
        return self.schemes(weight.name, weight.shape).activation_bits == 8

    def exact(self, kind: str, inputs: Sequence[str], *contents: Blob, **params: object) -> str:
        """`add` a layer whose numbers no option of an app touches."""
        return self.add(kind, inputs, *contents, **params, **{f"p{KEY}": EXACT})

    def copies(self, blob: str, count: int) -> tuple[str, ...]:
        """A blob has one reader in ncnn; Split makes several of it."""
        return self._split(blob, count, {})

    def exact_copies(self, blob: str, count: int) -> tuple[str, ...]:
        """`copies` that no option touches: a plain Split rounds even token ids to 16 bits."""
        return self._split(blob, count, {KEY: str(EXACT)})

    def _split(self, blob: str, count: int, params: Mapping[int, str]) -> tuple[str, ...]:
        name = f"_{len(self.layers)}"
        outputs = tuple(f"{name}{letter}" for letter in "abc"[:count])
        self.emit(Layer("Split", name, (blob,), outputs, params))
        return outputs

    def matrix(self, weight: Blob) -> str:
        """The blob [O rows, K] of a coded weight's values."""
        if is_transposed(weight):
            raise ExportError(f"ncnn stores {weight.name} transposed, and its scales belong to rows")
        scheme = self.schemes(weight.name, weight.shape)
        rows, columns = weight.shape[0], prod(weight.shape[1:])
        halved = are_halved(scheme, columns)
        stored = replace(weight, kind=NIBBLES if halved else CODES)
        bytes_ = self.exact("MemoryData", (), stored, p0=columns // 2 if halved else columns, p1=rows, p21=0)
        codes = self.exact("Cast", (bytes_,), p0=_INT8, p1=_FLOAT32)
        if halved:
            codes = self.unpack(codes)
        groups = scheme.groups(weight.shape)
        sides = {"p0": 1, "p1": rows} if groups == 1 else {"p0": 1, "p1": groups, "p2": rows}
        factors = self.exact("MemoryData", (), replace(weight, kind=SCALES), **sides)
        values = self.scaled(codes, factors, columns, groups)
        if not scheme.rank:
            return values
        up = self.exact("MemoryData", (), replace(weight, kind=UP), p0=scheme.rank, p1=rows, p21=0)
        down = self.exact("MemoryData", (), replace(weight, kind=DOWN), p0=columns, p1=scheme.rank, p21=0)
        return self.exact("BinaryOp", (values, self.exact("Gemm", (up, down))), p0=_ADD)

    def unpack(self, packed: str) -> str:
        """[rows, K / 2] of bytes, as `pack_nibbles` makes them -> [rows, K] of codes."""
        sixteenths = self.exact_copies(self.exact("BinaryOp", (packed,), p0=_MUL, p1=1, p2=1 / 16), 2)
        high = self.exact_copies(self.exact("UnaryOp", sixteenths[:1], p0=_FLOOR), 2)
        rest = self.exact("BinaryOp", (sixteenths[1], high[0]), p0=_SUB)
        low = self.exact("BinaryOp", (self.exact("BinaryOp", (rest,), p0=_MUL, p1=1, p2=16.0),), p0=_SUB, p1=1, p2=8.0)
        return self.exact("Concat", (high[1], low), p0=1)

    def scaled(self, codes: str, factors: str, columns: int, groups: int) -> str:
        """Codes [rows, columns] times factors [rows, 1], or [rows, groups, 1] for several groups a row."""
        if groups == 1:
            return self.exact("BinaryOp", (codes, factors), p0=_MUL)
        grouped = self.exact("Reshape", (codes,), p0=columns // groups, p1=groups, p2=-1)
        return self.exact("Reshape", (self.exact("BinaryOp", (grouped, factors), p0=_MUL),), p0=columns, p1=-1)

    def linear(self, layer: Layer, weight: Blob, bias: Blob | None) -> None:
        """A Gemm from `layer.inputs[0]` to `layer.outputs[0]`: [M, K] x [O, K]^T + bias."""
        rows, columns = weight.shape[0], prod(weight.shape[1:])
        coded = self.is_coded(weight)
        if coded and self.rounds_inputs(weight):
            products.linear(self, layer, weight, bias)
            return
        inputs = (layer.inputs[0], self.matrix(weight)) if coded else layer.inputs
        params = {3: 1, 6: 1, 8: rows, 9: columns, 10: 4 if bias else -1} | ({} if coded else {5: 1})
        gemm = Layer("Gemm", layer.name, inputs, layer.outputs, {key: str(value) for key, value in params.items()})
        self.emit(gemm, *([] if coded else [weight]), *([bias] if bias else []))


def _convolution(graph: Graph, layer: Layer, held: Mapping[str, Blob]) -> None:
    weight, bias = held["weight"], held.get("bias")
    scheme = graph.schemes(weight.name, weight.shape)
    outputs, has_bias = layer.number(0), int(bias is not None)
    if graph.rounds_inputs(weight):
        products.convolution(graph, layer, weight, bias)
        return
    is_plain = scheme.weight_bits == 8 and scheme.groups(weight.shape) == 1 and not scheme.rank
    if is_plain and weight.slot.elements >= _WORTH_A_BOOK:
        raw = f"{layer.name}.raw"
        bare = replace(layer, outputs=(raw,), params={**layer.params, 5: "0"})
        graph.emit(bare, replace(weight, kind=BOOK))
        scale = Layer("Scale", f"{layer.name}.scale", (raw,), layer.outputs, {0: str(outputs), 1: str(has_bias)})
        graph.emit(scale, replace(weight, kind=BOOK_SCALES), *([bias] if bias else []))
        return
    width = layer.number(1)
    height = layer.number(11, width)
    inputs = prod(weight.shape[1:]) // (width * height)
    kernel = graph.exact("Reshape", (graph.matrix(weight),), p0=width, p1=height, p11=inputs, p2=outputs)
    given = [layer.inputs[0], kernel]
    if bias:
        given.append(graph.add("MemoryData", (), bias, p0=outputs))
    graph.emit(replace(layer, inputs=tuple(given), params={**layer.params, 19: "1"}))


def _gemm(graph: Graph, layer: Layer, held: Mapping[str, Blob]) -> None:
    if layer.number(3) != 1 or layer.number(5) != 1 or layer.number(4) or layer.number(14):
        raise ExportError(f"ncnn's Gemm {layer.name} is no linear layer: its weights cannot be integers")
    graph.linear(layer, held["B"], held.get("C"))


def _inner_product(graph: Graph, layer: Layer, held: Mapping[str, Blob]) -> None:
    columns, product = prod(held["weight"].shape[1:]), f"{layer.name}.product"
    row = graph.add("Reshape", layer.inputs, p0=columns, p1=1)  # Gemm misreads a vector
    graph.linear(replace(layer, inputs=(row,), outputs=(product,)), held["weight"], held.get("bias"))
    graph.emit(Layer("Reshape", f"{layer.name}.vector", (product,), layer.outputs, {0: str(layer.number(0))}))


def _attention(graph: Graph, layer: Layer, held: Mapping[str, Blob]) -> None:
    if len(layer.inputs) == 2 or layer.number(5):
        raise ExportError(f"ncnn's MultiHeadAttention {layer.name} has a mask or shares its key: not supported")
    width, heads = layer.number(0), layer.number(1, 1)
    inputs = layer.inputs if len(layer.inputs) == 3 else graph.copies(layer.inputs[0], 3)
    parts = []
    for role, given in zip("qkv", inputs, strict=True):
        name = f"{layer.name}.{role}"
        graph.linear(Layer("Gemm", name, (given,), (name,), {}), held[f"{role}_weight"], held[f"{role}_bias"])
        parts.append(graph.add("Permute", (graph.add("Reshape", (name,), p0=width // heads, p1=heads, p2=-1),), p0=2))
    scale = layer.params.get(6, repr(1 / sqrt(width // heads)))
    graph.emit(Layer("SDPA", layer.name, tuple(parts), (layer.name,), {6: scale}))
    merged = graph.add("Reshape", (graph.add("Permute", (layer.name,), p0=2),), p0=width, p1=-1)
    output = Layer("Gemm", f"{layer.name}.out", (merged,), layer.outputs, {})
    graph.linear(output, held["out_weight"], held["out_bias"])


def _embed(graph: Graph, layer: Layer, held: Mapping[str, Blob]) -> None:
    if layer.number(2):
        raise ExportError(f"ncnn's Embed {layer.name} has a bias: its weights cannot be integers")
    weight = held["weight"]
    scheme, (rows, columns) = graph.schemes(weight.name, weight.shape), weight.shape
    halved, groups = are_halved(scheme, columns), scheme.groups(weight.shape)
    ids = graph.exact_copies(layer.inputs[0], 2)

    def looked_up(ids: str, width: int, kind: str) -> str:
        return graph.add("Embed", (ids,), replace(weight, kind=kind), p0=width, p1=rows, p2=0, p3=width * rows)

    codes = looked_up(ids[0], columns // 2 if halved else columns, NIBBLE_BOOK if halved else BOOK)
    factors = looked_up(ids[1], groups, SCALES if halved else BOOK_SCALES)
    if halved:
        codes = graph.unpack(codes)
    if groups > 1:
        factors = graph.exact("Reshape", (factors,), p0=1, p1=groups, p2=-1)
    graph.scaled(codes, factors, columns, groups)
    graph.layers[-1] = replace(graph.layers[-1], name=layer.name, outputs=layer.outputs)


_WRITERS: Final[Mapping[str, Callable[[Graph, Layer, Mapping[str, Blob]], None]]] = {
    "Convolution": _convolution,
    "Gemm": _gemm,
    "InnerProduct": _inner_product,
    "MultiHeadAttention": _attention,
    "Embed": _embed,
}
