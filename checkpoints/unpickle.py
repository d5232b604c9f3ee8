"""The child that reads a pickle's structure: `python -m diffusette.checkpoints.unpickle FILE` prints it as JSON.

Run by `pickled_file.py` under limits. torch's weights-only unpickler builds tensors and plain containers and nothing
else; under FakeTensorMode no tensor's bytes are read, and each storage says where in the file it lies.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

_DEPTH: Final = 4  # of dictionaries that tensors may lie in: {"state_dict": {...}}, {"string_to_param": {...}}


def main(file: str) -> int:
    """Print `{"tensors": [[name, dtype, shape, start, bytes, transposed], ...], "refused": ""}`."""
    # torch._dynamo, which fake tensors import, looks for a folder to write to, and finds none where nobody may write
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(file).resolve().parent)
    import torch
    from torch._subclasses import FakeTensorMode

    try:
        # not the path: of a name that ends in .safetensors torch believes it
        with FakeTensorMode(), Path(file).open("rb") as stream:
            content = torch.load(stream, weights_only=True, map_location="cpu")
    except Exception as problem:  # noqa: BLE001 - whatever the unpickler says is the answer
        json.dump({"tensors": [], "refused": f"{type(problem).__name__}: {problem}"[:2000]}, sys.stdout)
        return 0
    found = [_row(name, tensor) for name, tensor in _tensors(content, "", 0)]
    json.dump({"tensors": found, "refused": ""}, sys.stdout)
    return 0


def _tensors(content: Any, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    import torch

    if not isinstance(content, Mapping) or depth > _DEPTH:
        return
    inner = content.get("state_dict") if not prefix else None
    for name, value in (inner if isinstance(inner, Mapping) else content).items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}.", depth + 1)


def _row(name: str, tensor: Any) -> list[Any]:
    shape, stride = list(tensor.shape), list(tensor.stride())
    storage = tensor.untyped_storage()
    start = getattr(storage, "_checkpoint_offset", None)
    is_whole = tensor.is_contiguous()
    transposed = not is_whole and len(shape) == 2 and tensor.t().is_contiguous()
    if start is not None:
        start += tensor.storage_offset() * tensor.element_size()
    if not is_whole and not transposed:
        start = None  # strides that no slice of the file has
    kept = shape[::-1] if transposed else shape
    dtype = str(tensor.dtype).removeprefix("torch.")
    return [name, dtype, kept, start, tensor.numel() * tensor.element_size(), transposed, stride]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
