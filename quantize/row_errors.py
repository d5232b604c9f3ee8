"""What rounding costs each layer of a large component, from a few rows of its inputs and in one pass of the samples.

The moments that GPTQ needs take many passes over the UNet of Stable Diffusion 1.5, since they are larger than its
weights. To say which layer needs more bits than another, some hundred inputs x are enough: E|D x|^2 over them, with D
the error of plain rounding. The inputs go to a file while the component runs, and layers are rounded when it is out of
memory again: the peak is that of running it.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.weights import Weights
from ..stages.artifacts import ComponentSource
from ..stages.stage import Stage
from .calibrated import ERRORS, LAYERS, RoundedLayers, bare, layer_shapes, stored_schemes
from .codes import round_to_nearest
from .samples import Samples
from .scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

ROWS: Final = 256
"""Inputs of a layer that are kept, evenly over calls and positions: the mean of so many squares is known to about a
tenth, where losses of layers differ by powers of ten."""

_WORK: Final = 2**24  # numbers of a weight that are rounded at once: 64 MiB in float32


@dataclass(frozen=True)
class EstimateErrors(
    Stage[RoundedLayers], name="estimate-errors", version=1, tools=("torch", "diffusers", "transformers", "numpy")
):
    """E|D x|^2 of each output channel of every layer at each of `schemes`, over `ROWS` of its inputs.

    The result has errors and no codes: `CodePicker` rounds such layers to the nearest.
    """

    source: ComponentSource
    samples: Samples
    schemes: tuple[str, ...]
    calls: int  # samples that the inputs are taken from

    def key(self) -> Mapping[str, object]:
        return {**super().key(), "rows": ROWS}

    def run(self, into: Path) -> RoundedLayers:
        from safetensors.numpy import save_file

        shapes = layer_shapes(self.source)
        file = into / "inputs"
        kept = self._keep_inputs(file, shapes)
        gc.collect()  # modules hold reference cycles, and gigabytes
        weights = Weights(self.source)
        errors: dict[str, NDArray[Any]] = {}
        with file.open("rb") as stream:
            for path, (place, count) in kept.items():
                parameter, row = f"{path}.weight", prod(shapes[path][1:])
                stream.seek(place)
                inputs = np.fromfile(stream, np.float32, count * row).reshape(count, row)
                weight = weights.read(parameter).astype(np.float32, copy=False)
                name = f"{self.source.component}/{parameter}"
                for scheme in stored_schemes(parameter, weight.shape, self.schemes):
                    found = _errors(weight, scheme, inputs, name)
                    errors[f"{parameter}@{scheme.name}{ERRORS}"] = found.astype(np.float32)
        file.unlink()  # hundreds of megabytes that nobody reads again
        save_file(errors, into / LAYERS)
        return RoundedLayers(into, self.source.component, tuple(f"{path}.weight" for path in kept), self.schemes)

    def _keep_inputs(self, file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
        """Run the component; write each layer's inputs. Path -> where they begin in `file`, in bytes, and how many."""
        import torch

        from ..export import modules
        from .moments import rows_of, run_once, watched, weighted_modules

        wrapped = modules.load(self.source)
        layers = {path: layer for path, layer in weighted_modules(bare(wrapped)).items() if path in shapes}
        some = ROWS // len(self.samples.files(self.source.component, self.calls)) or 1
        places, end = {}, 0
        for path in layers:
            places[path] = end
            end += 4 * ROWS * prod(shapes[path][1:])
        counts = dict.fromkeys(layers, 0)
        with file.open("xb") as stream, torch.no_grad():

            def see(path: str, layer: Any, x: Tensor) -> None:
                row = prod(shapes[path][1:])
                found = rows_of(layer, x, some)[: ROWS - counts[path]]
                stream.seek(places[path] + 4 * row * counts[path])
                stream.write(np.ascontiguousarray(found.numpy()).data)
                counts[path] += len(found)

            with watched(layers, see):
                for feeds in self.samples.feeds(self.source.component, self.calls):
                    run_once(wrapped, feeds)
        return {path: (places[path], count) for path, count in counts.items() if count}


def _errors(weight: NDArray[np.float32], scheme: Scheme, inputs: NDArray[np.float32], name: str) -> NDArray[np.float64]:
    """Mean of |D x|^2 over `inputs` [N, K] for each output channel of `weight` [O, ...]: [O]."""
    found = []
    step = max(1, _WORK // prod(weight.shape[1:]))
    for first in range(0, len(weight), step):
        part = weight[first : first + step]
        miss = (round_to_nearest(part, scheme, name).dequantised() - part).reshape(len(part), -1)
        found.append(((miss @ inputs.T).astype(np.float64) ** 2).mean(1))
    return np.concatenate(found)
