"""An MNN model, loaded in this process."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...stages.artifacts import TargetModel
from ...stages.errors import ModelError, ToolCrashed
from ..arithmetic import PROVEN
from ..checks import checked_feeds, checked_results
from ..protocol import Array, Closing, Feeds
from .arithmetic import configuration, proven_in
from .mnn_file import MnnFile


class MnnSession(Closing):
    """A loaded model; satisfies `Session`.

    MNN has no errors for most misuse: too few inputs end the process, a wrong shape gives an empty list, NaN and
    missing weights give finite nonsense. So everything is checked on the way in and out.

    Raises:
        ModelError: the files are damaged or are not what `model` says.
    """

    def __init__(self, model: TargetModel, threads: int, arithmetic: str = PROVEN) -> None:
        file = MnnFile(model.folder / model.files[0])
        file.check_weights()
        names = {spec.name for spec in model.inputs}, {spec.name for spec in model.outputs}
        if set(file.inputs) != set(model.inputs) or set(file.outputs) != names[1]:
            raise ModelError(
                f"{file.path} takes {sorted(s.name for s in file.inputs)} and gives {sorted(file.outputs)}, "
                f"not {sorted(names[0])} and {sorted(names[1])} in the shapes that its bundle states",
                hint="the file is of another model or size: convert again",
            )
        self.inputs = model.inputs
        self.outputs = model.outputs
        self._name = f"mnn {model.component}"
        self._runtime, self._module = _load(file, self, threads, arithmetic or proven_in(model))

    def run(self, feeds: Feeds) -> dict[str, Array]:
        import MNN.expr as expr

        if self._module is None:
            raise ValueError(f"{self._name} is closed")
        kinds = {"float32": expr.float, "int32": expr.int}
        checked = checked_feeds(feeds, self.inputs, self._name)
        variables = [
            expr.const(np.ascontiguousarray(checked[spec.name]), list(spec.shape), expr.NCHW, kinds[spec.dtype])
            for spec in self.inputs
        ]
        results = self._module.forward(variables)
        if len(results) != len(self.outputs):
            raise ToolCrashed(f"{self._name} gave {len(results)} outputs instead of {len(self.outputs)}")
        arrays = [expr.convert(result, expr.NCHW).read().copy() for result in results]  # the next run reuses its memory
        return checked_results(
            {spec.name: array for spec, array in zip(self.outputs, arrays, strict=True)}, self.outputs, self._name
        )

    def close(self) -> None:
        self._module = None
        self._runtime = None


def _load(file: MnnFile, session: MnnSession, threads: int, arithmetic: str) -> tuple[Any, Any]:
    runtime = new_runtime(threads, arithmetic)
    inputs, outputs = [s.name for s in session.inputs], [s.name for s in session.outputs]
    return runtime, load_part(file, inputs, outputs, runtime)


def new_runtime(threads: int, arithmetic: str) -> Any:
    """MNN's runtime on the CPU with the options that an app sets for that arithmetic."""
    import MNN.nn

    backend, hints = configuration(arithmetic, threads)
    # Documented as a tuple of dicts, one a backend; a bare dict is taken for an empty configuration.
    runtime = MNN.nn.create_runtime_manager((backend,))
    for hint, value in hints.items():
        runtime.set_hint(hint, value)
    return runtime


def load_part(file: MnnFile, inputs: list[str], outputs: list[str], runtime: Any) -> Any:
    """The part of a model that leads from `inputs` to `outputs`, names of any of its tensors, as an MNN module.

    Raises:
        ModelError: MNN refuses the file, or a name.
    """
    import MNN.nn

    try:
        return MNN.nn.load_module_from_file(str(file.path), inputs, outputs, runtime_manager=runtime)
    except Exception as error:  # MNN raises bare Exception and SystemError
        raise ModelError(f"MNN cannot load {file.path}: {error}", hint="fetch or convert it again") from error
