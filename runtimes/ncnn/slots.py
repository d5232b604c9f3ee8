"""ncnn's `.bin` file: weights without names, in the order of the layers and, within one, of its `load_model`.

Source: Tencent/ncnn, `src/layer/*.cpp` (`load_param`, `load_model`) and `src/modelbin.cpp`. A *tagged* weight starts
with four bytes that say how it is stored; an untagged one is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...stages.errors import ModelError
from .param import Layer

TAG_FP32: Final = (0).to_bytes(4, "little")
TAG_FP16: Final = (0x01306B47).to_bytes(4, "little")
TAG_INT8: Final = (0x000D4B38).to_bytes(4, "little")
TAG_BOOK: Final = (1).to_bytes(4, "little")  # ncnn takes any other tag with a byte that is not 0 for a codebook
_BYTES_PER_ELEMENT: Final = {TAG_FP32: 4, TAG_FP16: 2, TAG_INT8: 1, TAG_BOOK: 1}
_BOOK_BYTES: Final = 256 * 4  # of float32 before the indices


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one array of weights."""

    layer: str
    type: str
    role: str  # weight, bias, q_weight, ...: ncnn's member name without `_data`
    tagged: bool
    elements: int


def _convolution(layer: Layer) -> Iterator[tuple[str, bool, int]]:
    if layer.number(19):  # weights are an input
        return
    yield "weight", True, layer.number(6)
    if layer.number(5):
        yield "bias", False, layer.number(0)
    if layer.number(8):  # integers: a multiplier for each row of weights, one for the input
        yield "weight_scales", False, layer.number(0)
        yield "input_scale", False, 1


def _inner_product(layer: Layer) -> Iterator[tuple[str, bool, int]]:
    yield "weight", True, layer.number(2)
    if layer.number(1):
        yield "bias", False, layer.number(0)


def _gemm(layer: Layer) -> Iterator[tuple[str, bool, int]]:
    m, n, k = (layer.number(key) for key in (7, 8, 9))
    if layer.number(4):
        yield "A", True, m * k
    if layer.number(5):
        yield "B", True, n * k
    broadcast = layer.number(10)  # -1: no C
    if layer.number(6) and broadcast != -1:
        yield "C", True, (1, m, m, n * m, n)[broadcast]
    if layer.number(18):
        yield "B_scale", False, 1


def _multi_head_attention(layer: Layer) -> Iterator[tuple[str, bool, int]]:
    embed_dim = layer.number(0)
    q_dim = layer.number(2) // embed_dim
    k_dim, v_dim = layer.number(3, embed_dim), layer.number(4, embed_dim)
    for role, columns in (("q", q_dim), ("k", k_dim), ("v", v_dim)):
        yield f"{role}_weight", True, embed_dim * columns
        yield f"{role}_bias", False, embed_dim
    yield "out_weight", True, q_dim * embed_dim
    yield "out_bias", False, q_dim


def _scale(layer: Layer) -> Iterator[tuple[str, bool, int]]:
    yield "scale", False, layer.number(0)
    if layer.number(1):
        yield "bias", False, layer.number(0)


def _group_norm(layer: Layer) -> Iterator[tuple[str, bool, int]]:
    if layer.number(3, 1):
        yield "gamma", False, layer.number(1)
        yield "beta", False, layer.number(1)


def _layer_norm(layer: Layer) -> Iterator[tuple[str, bool, int]]:
    if layer.number(2, 1):
        yield "gamma", False, layer.number(0)
        yield "beta", False, layer.number(0)


def _embed(layer: Layer) -> Iterator[tuple[str, bool, int]]:
    yield "weight", True, layer.number(3)
    if layer.number(2):
        yield "bias", False, layer.number(0)


def _memory_data(layer: Layer) -> Iterator[tuple[str, bool, int]]:
    w, h, d, c = (layer.number(key) for key in (0, 1, 11, 2))
    yield "data", layer.number(21, 1) == 0, w * (h or 1) * (d or 1) * (c or 1)


# Layers that are not here are taken to have no weights. A mistake cannot pass: every blob is compared with the
# parameter that it must be, and the walk must end where the file ends.
WEIGHTED: Final[dict[str, Callable[[Layer], Iterator[tuple[str, bool, int]]]]] = {
    "Convolution": _convolution,
    "InnerProduct": _inner_product,
    "Gemm": _gemm,
    "MultiHeadAttention": _multi_head_attention,
    "Scale": _scale,
    "GroupNorm": _group_norm,
    "LayerNorm": _layer_norm,
    "Embed": _embed,
    "MemoryData": _memory_data,
}


def slots_of(layers: Iterable[Layer]) -> Iterator[Slot]:
    """The weights of `layers`, in the order of the `.bin` file.

    Raises:
        ModelError: a layer's parameters are none that its type can have.
    """
    for layer in layers:
        if layer.type not in WEIGHTED:
            continue
        try:
            found = [Slot(layer.name, layer.type, *slot) for slot in WEIGHTED[layer.type](layer)]
        except (ZeroDivisionError, IndexError):
            raise _impossible(layer) from None
        if any(slot.elements < 0 for slot in found):
            raise _impossible(layer)
        yield from found


def _impossible(layer: Layer) -> ModelError:
    shown = " ".join(f"{key}={value[:40]}" for key, value in layer.params.items())
    return ModelError(f"{layer.type} {layer.name} cannot have the parameters {shown}", hint="convert again")


def spans_of(layers: Iterable[Layer], file: Path) -> Iterator[tuple[Slot, int, int]]:
    """Each weight of a `.bin` file with the bytes at which it starts, tag included, and ends; the first beyond it last.

    Raises:
        ModelError: where a tag must be is none.
    """
    size = file.stat().st_size
    position = 0
    with file.open("rb") as stream:
        for slot in slots_of(layers):
            start, width = position, 4
            if slot.tagged:
                stream.seek(position)
                tag = stream.read(4)
                if tag not in _BYTES_PER_ELEMENT:
                    raise ModelError(
                        f"{file.name}: no weight starts at byte {position} of {size}, where the graph puts {slot.role} "
                        f"of {slot.layer} ({slot.type}): it holds {tag.hex() or 'nothing'}",
                        hint="the file is damaged or belongs to another .param: convert again",
                    )
                position += 4 + (_BOOK_BYTES if tag == TAG_BOOK else 0)
                width = _BYTES_PER_ELEMENT[tag]
            position += -(-slot.elements * width // 4) * 4  # padded to whole words
            yield slot, start, position
            if position > size:
                return


def check_bin(layers: Iterable[Layer], file: Path) -> None:
    """Compare the length of a `.bin` file with what the graph and the tags in the file say.

    ncnn itself accepts trailing bytes and another model's file without a word, and crashes when a model is run
    after a failed load.

    Raises:
        ModelError: the file is too short, too long, or holds an unknown tag.
    """
    size = file.stat().st_size
    position = max((end for _, _, end in spans_of(layers, file)), default=0)
    if position != size:
        raise ModelError(
            f"{file.name} has {size} bytes, the graph needs {position}{' or more' if position > size else ''}",
            hint="the file is cut or belongs to another .param: convert again",
        )
