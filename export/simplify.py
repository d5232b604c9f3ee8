"""onnxsim over a graph without weights: constants fold, shapes settle, and memory stays that of the nodes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..stages.errors import ExportError
from ..stages.stage import Stage
from .graph import Graph


@dataclass(frozen=True)
class SimplifyGraph(Stage[Graph], name="simplify", version=1, tools=("onnxsim", "onnx")):
    """Graph -> the same Graph with fewer nodes."""

    graph: Graph

    def run(self, into: Path) -> Graph:
        import onnx
        import onnxsim

        before = onnx.load(str(self.graph.file))
        modules = {out: _module(node) for node in before.graph.node for out in node.output}
        wanted = _interface(before)
        # Nothing can be run here: the weights are inputs. The parity gate proves what comes of it.
        after, _ = onnxsim.simplify(before, check_n=0)
        if _interface(after) != wanted:
            raise ExportError(
                f"onnxsim changed the inputs or outputs of {self.graph.component}", hint="report this as a bug"
            )
        for node in after.graph.node:  # onnxsim drops metadata; parity reports need it
            if not _module(node) and (path := next((modules[o] for o in node.output if modules.get(o)), "")):
                node.metadata_props.add(key="module", value=path)
        onnx.save(after, str(into / "graph.onnx"))
        shutil.copyfile(self.graph.folder / "weights.json", into / "weights.json")
        return replace(self.graph, folder=into, digest="")


def _interface(model: Any) -> list[tuple[str, bytes]]:
    return [(v.name, v.type.SerializeToString()) for v in [*model.graph.input, *model.graph.output]]


def _module(node: object) -> str:
    props = getattr(node, "metadata_props", ())
    return next((p.value for p in props if p.key == "module"), "")
