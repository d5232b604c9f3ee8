"""An ncnn graph and the places of its weights, learned without any weights.

pnnx is the hungry step of a conversion, and with full-size pictures the slow one. So it runs once an architecture, on
fingerprints, at two small sizes, and where it can on two narrow copies of the network (`narrow`); fine-tunes,
precisions and picture sizes share the result. docs/decisions/0011.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...export import contract
from ...stages.artifacts import ComponentSource, TensorSpec, role_of
from ...stages.errors import ExportError
from ...stages.stage import Stage
from .. import narrowing
from . import layout, narrow, param, pnnx
from .lower import architecture, lowered, native_inputs, shapes_and_heads, without_weights

# Roles whose narrow copies have other heads; in the others' graphs they grow with the width, or are 1.
_HEADS_ASIDE: Final = ("denoiser", "control")
_THREADS: Final = 2  # the module is run once; more threads take more memory than they save time


@dataclass(frozen=True)
class TracedNcnn:
    """An ncnn graph (`model.param`), the sources of its weights (`layout.json`), and its constants (`literals.bin`)."""

    folder: Path
    component: str
    note: str = ""  # why pnnx got the network at its full width, if it did
    digest: str = ""

    @property
    def param(self) -> Path:
        return self.folder / "model.param"

    @property
    def literals(self) -> Path:
        return self.folder / "literals.bin"

    def blobs(self) -> tuple[layout.Blob, ...]:
        """The weights in the order of the `.bin` file."""
        from pydantic import TypeAdapter

        return TypeAdapter(tuple[layout.Blob, ...]).validate_json((self.folder / "layout.json").read_bytes())


@dataclass(frozen=True)
class TraceNcnn(
    Stage[TracedNcnn], name="pnnx", version=2, tools=("torch", "diffusers", "transformers", "pnnx", "ncnn")
):
    """Trace a component's module with fingerprints for weights, let pnnx convert it, and find them again.

    pnnx runs the model at every size in `sizes`. What differs between two becomes an expression in the graph, so
    that the graph computes at other sizes too.
    """

    component: str
    config: Mapping[str, Any]  # from `lower.architecture`
    sizes: tuple[tuple[int, int], ...]  # one or two of (height, width) in pixels, from `small_sizes`

    def run(self, into: Path) -> TracedNcnn:
        from pydantic import TypeAdapter

        with tempfile.TemporaryDirectory(prefix="pnnx.", dir=into) as private:
            converted, note = self._converted(Path(private))
        source = without_weights(self.component, self.config)
        inputs, outputs = native_inputs(source, self.sizes[0]), contract.output_specs(source, self.sizes[0])
        names = {f"in{index}": spec.name for index, spec in enumerate(inputs)}
        names |= {f"out{index}": spec.name for index, spec in enumerate(outputs)}
        (into / "model.param").write_text(param.render(param.rename_blobs(converted.layers, names)))
        pnnx.check_layers(into / "model.param")
        (into / "literals.bin").write_bytes(converted.literals)
        blobs = TypeAdapter(tuple[layout.Blob, ...]).dump_json(converted.blobs, indent=1)
        (into / "layout.json").write_bytes(blobs)
        return TracedNcnn(into, self.component, note)

    def _converted(self, scratch: Path) -> tuple[_Converted, str]:
        """The graph, from narrow copies of the network where it can be, and why not otherwise."""
        plan = narrowing.narrowing(self.component, self.config)
        if plan is None:
            return _convert(
                without_weights(self.component, self.config), self.sizes, scratch
            ), "too small or too uneven"
        copies = [_convert(without_weights(self.component, config), self.sizes, scratch) for config in plan.configs]
        try:
            return self._widened(copies, plan), ""
        except narrowing.NotAlikeError as reason:
            note = str(reason)
        return _convert(without_weights(self.component, self.config), self.sizes, scratch), note

    def _widened(self, copies: list[_Converted], plan: narrowing.Narrowing) -> _Converted:
        shapes, heads = shapes_and_heads(without_weights(self.component, self.config))
        if copies[0].literals != copies[1].literals:
            raise narrowing.NotAlikeError("a constant of the graph depends on its width")
        layers = narrow.widened([copy.layers for copy in copies], plan.widths, plan.real)
        if role_of(self.component) in _HEADS_ASIDE:
            layers = narrow.with_heads(layers, copies[0].blobs, heads)
        blobs = tuple(narrow.widened_blobs(layers, [copy.blobs for copy in copies], shapes))
        return _Converted(layers, blobs, copies[0].literals)


@dataclass(frozen=True)
class _Converted:
    """What pnnx made of a network: the graph, where its weights lie, and the bytes of its constants."""

    layers: tuple[param.Layer, ...]
    blobs: tuple[layout.Blob, ...]
    literals: bytes


def _convert(source: ComponentSource, sizes: tuple[tuple[int, int], ...], scratch: Path) -> _Converted:
    module, fingerprints = lowered(source)
    inputs = [native_inputs(source, size) for size in sizes]
    script = scratch / "model.pt"
    _trace(module, inputs[0], script)
    del module
    graph, weights = pnnx.convert(script, inputs, scratch)
    layers = param.parse(graph.read_text())
    with (scratch / "literals.bin").open("w+b") as literals:
        blobs = layout.learn(layers, weights, fingerprints, literals)
        literals.seek(0)
        return _Converted(layers, blobs, literals.read())


def small_sizes(source: ComponentSource, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Small picture sizes at which PyTorch runs the same operations as at `size`; one where none matters.

    They agree with it in how often a side divides by two, for diffusers decides on that in Python, and differ from
    each other in both sides.
    """
    if "block_out_channels" not in source.config:
        return ((0, 0),)
    unit = 8 * 2 ** (len(source.config["block_out_channels"]) - 1)  # pixels that the deepest level sees as one
    height, width = (side % unit for side in size)
    return (2 * unit + height, 3 * unit + width), (3 * unit + height, 4 * unit + width)


def _trace(module: Any, inputs: tuple[TensorSpec, ...], script: Path) -> None:
    """Write the module as TorchScript. The weights' windows are saved as they are: a UNet's file has 7 MB."""
    import torch

    torch.set_num_threads(min(_THREADS, torch.get_num_threads()))
    examples = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in inputs)
    try:
        with torch.no_grad():
            trace: Any = torch.jit.trace  # untyped in torch
            # pnnx would insist on the size of stored inputs
            traced = trace(module, examples, check_trace=False, _store_inputs=False)
    except RuntimeError as error:
        raise ExportError(f"torch could not trace the module for ncnn: {error}") from error
    traced.save(str(script))


def trace_of(source: ComponentSource, size: tuple[int, int]) -> TraceNcnn:
    """The stage for the architecture of `source`, whose graph computes at `size` among others."""
    return TraceNcnn(source.component, architecture(source.config), small_sizes(source, size))
