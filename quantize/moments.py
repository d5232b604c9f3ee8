"""Second moments of what enters a layer: all that rounding by output error has to know of the calibration data.

A linear layer or convolution computes W x for every token or patch x. An error D in W costs E|D x|^2 = tr(D M D^T)
with M = E[x x^T], the same for all output channels. M of a large layer is larger than the layer, so layers are taken
in chunks, and a long row is cut into blocks of inputs that are treated as uncorrelated with each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import ceil, prod
from typing import TYPE_CHECKING, Any, Final, cast

from .samples import Feeds

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK: Final = 4608  # inputs: 512 channels of a 3 x 3 convolution; M then takes 85 MB
ROWS: Final = 4096  # patches or tokens of one call that enter M; more are sampled evenly
CHUNK_BYTES: Final = 2**29  # of the moments that are held at once


def weighted_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Path -> linear layer or ungrouped convolution of a component's bare module, in order of definition."""
    from torch import nn

    found = {}
    for path, layer in module.named_modules():
        plain = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        if plain and not layer.weight.is_meta:  # on meta: an autoencoder's other half
            found[path] = layer
    return found


def run_once(wrapped: nn.Module, feeds: Feeds) -> Tensor:
    """Run a wrapped component (`export.modules.wrap`) on one sample's feeds; several outputs come as one, flat."""
    import numpy as np
    import torch

    names = cast("tuple[str, ...]", wrapped.input_names)
    result: Tensor | tuple[Tensor, ...] = wrapped(*(torch.from_numpy(np.array(feeds[name])) for name in names))
    return torch.cat([part.flatten() for part in result]) if isinstance(result, tuple) else result


@contextmanager
def watched(layers: Mapping[str, nn.Module], see: Any) -> Iterator[None]:
    """Call `see(path, layer, input)` before each of `layers` runs."""

    def hook(path: str) -> Any:
        return lambda layer, inputs: see(path, layer, inputs[0])

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(row: int) -> tuple[tuple[int, int], ...]:
    """Start and end of each block of a row of `row` inputs; of nearly equal lengths, at most `BLOCK`."""
    count = ceil(row / BLOCK)
    edges = [index * row // count for index in range(count + 1)]
    return tuple(pairwise(edges))


def bytes_of(shape: Sequence[int]) -> int:
    """Bytes of the moments of a weight of `shape` [O, ...], in float32."""
    return sum(4 * (end - start) ** 2 for start, end in blocks_of(prod(shape[1:])))


def chunks_of(shapes: Mapping[str, Sequence[int]], limit: int = CHUNK_BYTES) -> tuple[tuple[str, ...], ...]:
    """Cut layers (path -> shape of the weight) into runs whose moments take at most `limit` bytes together.

    A single layer never exceeds it: a row of 23040 inputs, the longest of Stable Diffusion 1.5, takes 425 MB.
    """
    chunks: list[list[str]] = []
    room = 0
    for path, shape in shapes.items():
        need = bytes_of(shape)
        if not chunks or need > room:
            chunks.append([])
            room = limit
        chunks[-1].append(path)
        room -= need
    return tuple(tuple(chunk) for chunk in chunks)


def rows_of(layer: Any, x: Tensor, most: int = ROWS) -> Tensor:
    """What a layer multiplies its weight rows with: [P, K], P at most `most` a picture, evenly sampled.

    A convolution's patches have the order of its flattened weight: input channel, then row, then column.
    """
    import torch
    from torch import nn

    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows if len(rows) <= most else rows[torch.linspace(0, len(rows) - 1, most).long()]
    (kernel_y, kernel_x), (stride_y, stride_x) = layer.kernel_size, layer.stride
    (pad_y, pad_x), (dilation_y, dilation_x) = layer.padding, layer.dilation
    x = torch.nn.functional.pad(x, (pad_x, pad_x, pad_y, pad_y))
    height = (x.shape[2] - dilation_y * (kernel_y - 1) - 1) // stride_y + 1
    width = (x.shape[3] - dilation_x * (kernel_x - 1) - 1) // stride_x + 1
    count = height * width
    places = torch.arange(count) if count <= most else torch.linspace(0, count - 1, most).long()
    top, left = places // width * stride_y, places % width * stride_x
    taps = [
        x[:, :, top + i * dilation_y, left + j * dilation_x]  # [N, C, P]
        for i in range(kernel_y)
        for j in range(kernel_x)
    ]
    return torch.stack(taps, -1).transpose(1, 2).reshape(x.shape[0] * len(places), -1)


def measure_moments(
    wrapped: nn.Module, layers: Mapping[str, nn.Module], feeds: Iterable[Feeds]
) -> dict[str, list[Tensor]]:
    """M = E[x x^T] of each of `layers`, float32, one matrix for each block of its row."""
    import torch

    moments: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = {}

    def see(path: str, layer: Any, x: Tensor) -> None:
        rows = rows_of(layer, x.detach())
        if path not in moments:
            moments[path] = [torch.zeros(end - start, end - start) for start, end in blocks_of(rows.shape[1])]
        for matrix, (start, end) in zip(moments[path], blocks_of(rows.shape[1]), strict=True):
            part = rows[:, start:end]
            matrix.addmm_(part.T, part)
        counts[path] = counts.get(path, 0) + len(rows)

    with torch.no_grad(), watched(layers, see):
        for sample in feeds:
            run_once(wrapped, sample)
    for path, matrices in moments.items():
        for matrix in matrices:
            matrix.div_(counts[path])
    return moments


def output_error(difference: Tensor, moments: Sequence[Tensor]) -> Tensor:
    """E|d x|^2 of each row d of `difference` [O, K]: [O], float64."""
    import torch

    total = torch.zeros(len(difference), dtype=torch.float64)
    for matrix, (start, end) in zip(moments, blocks_of(difference.shape[1]), strict=True):
        part = difference[:, start:end]
        total += ((part @ matrix.to(part.dtype)) * part).sum(1).double()
    return total
