"""Weight files in either form: safetensors, or what torch.save wrote, never unpickled here."""

from __future__ import annotations

from pathlib import Path

from ..stages.artifacts import StoredTensor
from .pickled_file import is_pickled, read_pickled
from .safetensors_file import read_header, read_metadata


def read_stored(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Name -> tensor, and the metadata that safetensors files have. No tensor is read.

    Raises:
        CheckpointError: the file is neither, is damaged, or is a pickle that would run code.
    """
    if file.is_file() and is_pickled(file):
        return read_pickled(file), {}
    return read_header(file), read_metadata(file)
