"""Weights of one component, tensor by tensor, under the names of today's diffusers and transformers classes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..stages.artifacts import Adapted, ComponentSource, StoredTensor
from ..stages.errors import CheckpointError
from .families import Part, get_family
from .safetensors_file import read_header, read_tensor
from .survey import place_of

SHOWN = 5  # names listed in an error before "and N more"


class Weights:
    """The tensors of `source`. Only headers are held in memory; each `read` reads one tensor from its file."""

    def __init__(self, source: ComponentSource) -> None:
        part = get_family(source.family).part(source.component)
        stored = source.tensors or [tensor for file in source.files for tensor in read_header(file).values()]
        self._component = source.component
        unused = re.compile(part.unused(source.config))
        named = current_names(stored, part)
        self._tensors = {name: tensor for name, tensor in named.items() if not unused.search(name)}
        self._unused = tuple(name for name in named if name not in self._tensors)
        self._squeezed = re.compile(part.squeezed)
        self._changes: dict[str, list[Adapted]] = {}
        for change in source.adapted:
            self._changes.setdefault(change.parameter, []).append(change)

    def names(self) -> tuple[str, ...]:
        """Names of the state_dict, in the order of the tensors in their files: reading so never seeks back."""
        return tuple(self._tensors)

    def unused(self) -> tuple[str, ...]:
        """Names that the file holds for this component, and nothing computes with."""
        return self._unused

    def spec(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype name as stored ("float32", "float16", "bfloat16", ...) and shape as `read` returns it.

        What adapters change is float32: rounding it back would lose some of the change.
        """
        tensor = self._find(name)
        return "float32" if name in self._changes else tensor.dtype, self._shape(name, tensor)

    def read(self, name: str) -> NDArray[Any]:
        """Read one tensor, C-contiguous, in its stored dtype; bfloat16, which numpy lacks, widens to float32.

        What adapters change comes merged, in float32.
        """
        values = self.read_unchanged(name)
        if name in self._changes:
            from .adapters.merge import merge_all

            return merge_all(values, self._changes[name])
        return values

    def read_unchanged(self, name: str) -> NDArray[Any]:
        """As `read`, before any adapter."""
        tensor = self._find(name)
        values = read_tensor(tensor)
        if name not in self._changes:
            values = values.reshape(self._shape(name, tensor))
        return values.astype(np.float32) if tensor.dtype == "bfloat16" else values

    def content(self, known: Mapping[Path, Mapping[str, str]]) -> list[list[Any]]:
        """Name, dtype and sha256 of the values of every tensor, by name: equal for equal weights in any layout.

        A tensor that adapters change lists them too: kind, scale, settings, sha256 of each factor.

        Args:
            known: file -> `survey.place_of` a tensor -> sha256 of its bytes; slices and transposed are read instead.
        """
        listed: list[list[Any]] = []
        for name, tensor in sorted(self._tensors.items()):
            stored = None if tensor.transposed else known.get(tensor.file, {}).get(place_of(tensor))
            changes = [_description(change) for change in self._changes.get(name, ())]
            listed.append([name, tensor.dtype, stored or _sha256(read_tensor(tensor)), *changes])
        return listed

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with those of the module that the weights are for.

        Raises:
            CheckpointError: lists what is missing, unexpected or of another shape.
        """
        found = {name: self._shape(name, tensor) for name, tensor in self._tensors.items()}
        missing = [name for name in expected if name not in found]
        unexpected = [name for name in found if name not in expected]
        reshaped = [
            f"{name} is {list(found[name])}, the config asks for {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != tuple(shape)
        ]
        problems = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        lines = [f"  {len(names)} {kind}: {_first(names)}" for kind, names in problems if names]
        if lines:
            files = ", ".join(sorted({str(tensor.file) for tensor in self._tensors.values()}))
            raise CheckpointError(
                f"{self._component}: weights do not fit its config.json ({files})\n" + "\n".join(lines),
                hint="take config.json and weights from the same checkpoint",
            )

    def _find(self, name: str) -> StoredTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self._component}: no tensor named {name!r}") from None

    def _shape(self, name: str, tensor: StoredTensor) -> tuple[int, ...]:
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        is_pointwise = len(shape) == 4 and shape[2:] == (1, 1)
        if is_pointwise and self._squeezed.search(name):
            return shape[:2]
        appended = sum(c.factors[0].shape[0] for c in self._changes.get(name, ()) if c.kind == "rows")
        return (shape[0] + appended, *shape[1:]) if appended else shape


def current_names(stored: Iterable[StoredTensor], part: Part) -> dict[str, StoredTensor]:
    """Today's name -> tensor, for the tensors that belong to `part`.

    Raises:
        CheckpointError: two tensors have one name.
    """
    named: dict[str, StoredTensor] = {}
    for tensor in stored:
        name = tensor.name
        for pattern, replacement in part.renames:
            name = re.sub(pattern, replacement, name)
        if re.search(part.ignored, name) or not re.search(part.weights, name):
            continue
        if name in named:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name!r} and {named[name].name!r} (in {named[name].file.name}) "
                f"are both {name!r}",
                hint="the file mixes two versions of one model: save it again",
            )
        named[name] = tensor
    return named


def _description(change: Adapted) -> dict[str, Any]:
    factors = {role: _sha256(read_tensor(f)) for role, f in zip(change.roles, change.factors, strict=True)}
    return {"kind": change.kind, "scale": change.scale, "settings": dict(change.settings), "factors": factors}


def _sha256(values: NDArray[Any]) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


def _first(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
