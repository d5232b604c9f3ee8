"""Arrays that lie in files, mapped into memory: what was read of them can be let go before they are."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from .protocol import Array

_PAUSE: Final = 0.1  # seconds: a runtime that reads a feed again and again finds its pages gone ten times a second


@contextmanager
def dropped_pages(arrays: Iterable[Array]) -> Iterator[None]:
    """While the block runs, let go of the pages of those of `arrays` that are mapped from files.

    A page that is needed again comes back from the file, so nothing changes but resident memory: native code that is
    handed gigabytes then holds what it reads at the moment. Where the system cannot be told, nothing is done.
    """
    mappings = [found for array in arrays if (found := _mapping(array))] if hasattr(mmap, "MADV_DONTNEED") else []
    done = threading.Event()

    def drop() -> None:
        while not done.wait(_PAUSE):
            for each in mappings:
                each.madvise(mmap.MADV_DONTNEED)

    thread = threading.Thread(target=drop, daemon=True)
    if mappings:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if mappings:
            thread.join()


def _mapping(array: Array) -> mmap.mmap | None:
    """The file mapping that holds an array's numbers, if it cannot be written to: else changes might get lost."""
    owner: Any = array
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = getattr(owner, "base", None)
    return owner if owner is not None and not array.flags.writeable else None
