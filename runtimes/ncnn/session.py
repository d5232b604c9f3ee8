"""ncnn in this process. It crashes on damaged files and wrong calls: callers want `isolation.open_isolated`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...stages.artifacts import TargetModel, TensorSpec, role_of
from ...stages.errors import ModelError, ToolCrashed
from ..arithmetic import PROVEN
from ..checks import checked_feeds, checked_results
from ..protocol import Array, Closing, Feeds
from . import masks
from .arithmetic import net_with, options_of
from .forms import check_forms, check_products
from .low_bit import CODED_LAYERS
from .param import parse
from .products import any_integers
from .slots import check_bin


class NcnnSession(Closing):
    """A loaded ncnn model.

    Raises:
        ModelError: the files do not fit each other, or ncnn refuses them.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, model: TargetModel, threads: int, arithmetic: str = PROVEN) -> None:
        import ncnn

        self.inputs, self.outputs = model.inputs, model.outputs
        self._name = f"ncnn {model.component}"
        self._ncnn: Any = ncnn
        self._net: Any = open_net(model, threads, arithmetic)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run once on batch 1; ncnn itself knows no batch, so the leading axis is taken off and put back."""
        if self._net is None:
            raise ModelError(f"{self._name} is closed")
        extractor = self._net.create_extractor()
        for name, array in checked_feeds(feeds, self.inputs, self._name).items():
            # a Mat does not own the memory of the array that it is made from
            mat = self._ncnn.Mat(np.ascontiguousarray(array[0])).clone()
            if status := extractor.input(name, mat):
                raise ToolCrashed(f"{self._name} does not take {name} (status {status})")
        results = {}
        for spec in self.outputs:
            status, mat = extractor.extract(spec.name)
            if status:
                raise ToolCrashed(f"{self._name} gave no {spec.name} (status {status})", hint="is memory short?")
            results[spec.name] = np.array(mat)[None]
        return checked_results(results, self.outputs, self._name)

    def close(self) -> None:
        if self._net is not None:
            self._net.clear()
            self._net = None


def open_net(model: TargetModel, threads: int, arithmetic: str = PROVEN) -> Any:
    """Load a model's files into an `ncnn.Net` that computes in an arithmetic of `arithmetic.py`.

    Raises:
        ModelError: the files do not fit each other, or ncnn refuses them.
    """
    param, weights = (model.folder / file for file in model.files)
    check_files(param, weights, model.inputs, model.outputs)
    options = {**options_of(arithmetic), **_unmasked_options(model.component, param)}
    net = net_with(options, threads)
    # after a failed load the net must never be run: it would take the process down
    for load, file in ((net.load_param, param), (net.load_model, weights)):
        if status := load(str(file)):
            net.clear()
            raise ModelError(f"ncnn refuses {file.name} (status {status})", hint="convert again")
    return net


def _unmasked_options(component: str, param: Path) -> dict[str, bool]:
    """Options that graphs of earlier versions were proven with; today's say it layer by layer (`masks.py`)."""
    layers = parse(param.read_text(), param.name)
    if any(masks.KEY in layer.params for layer in layers) or not any(layer.type == "Convolution" for layer in layers):
        return {}
    return {
        "use_winograd_convolution": False,
        "use_sgemm_convolution": role_of(component) not in ("decoder", "encoder"),
    }


def check_files(param: Path, weights: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Refuse files that are missing, cut, another model's by inputs and outputs, or in a form that ncnn misreads."""
    for file in (param, weights):
        if not file.is_file():
            raise ModelError(f"no file {file}", hint="convert again")
    layers = parse(param.read_text(errors="replace"), param.name)
    made = {blob for layer in layers for blob in layer.outputs}
    taken = sorted(layer.name for layer in layers if layer.type == "Input")
    if taken != sorted(spec.name for spec in inputs) or not {spec.name for spec in outputs} <= made:
        raise ModelError(f"{param.name} has the inputs {', '.join(taken)}: it is another model's graph")
    check_bin(layers, weights)
    if any(layer.type in CODED_LAYERS for layer in layers):
        check_forms()
    if any_integers(layers):
        check_products()
