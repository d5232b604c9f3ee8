"""Several picture sizes of one checkpoint: a bundle each, and one copy on disk of what they have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..bundle.bundle import Bundle
from .conversion import Conversion
from .request import Request

Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True, slots=True)
class SizedConversions:
    """A conversion a size, and the bytes that hard links saved."""

    conversions: dict[Size, Conversion]
    shared_bytes: int

    @property
    def ok(self) -> bool:
        return all(each.ok for each in self.conversions.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "sizes": {folder_of(size): each.to_json() for size, each in self.conversions.items()},
            "shared_bytes": self.shared_bytes,
        }


def folder_of(size: Size) -> str:
    """The name of a size's folder: `512x768` is 512 high and 768 wide."""
    return f"{size[0]}x{size[1]}"


def convert_sizes(
    request: Request, sizes: Iterable[Size], convert_one: Callable[[Request], Conversion]
) -> SizedConversions:
    """Convert `request` at each of `sizes` into OUTPUT/HEIGHTxWIDTH, then let equal files be one file on disk.

    Stages whose result does not depend on the size come from the cache. What is equal afterwards is the target's
    matter: all of ncnn, ORT's weights (`.onnx_data`), and of MNN the text encoders only, whose graphs hold no size.
    """
    root = Path(request.output)
    done = {
        size: convert_one(replace(request, size=size, output=root / folder_of(size))) for size in dict.fromkeys(sizes)
    }
    bundles = [each.bundle for conversion in done.values() for each in conversion.converted]
    return SizedConversions(done, share_files(bundles))


def share_files(bundles: Iterable[Bundle]) -> int:
    """Make files that the manifests declare equal (same sha256, same size) hard links of one file.

    The hash is checked where the file is kept, never assumed. File systems without hard links keep their copies.

    Returns:
        Bytes saved.
    """
    from ..stages.hashing import sha256_of_file

    kept: dict[tuple[str, int], Path] = {}
    saved = 0
    for bundle in bundles:
        for entry in dict.fromkeys(bundle.manifest.files()):
            place = bundle.path / entry.path
            first = kept.setdefault((entry.sha256, entry.bytes), place)
            if first is place or first.samefile(place) or not entry.bytes:
                continue
            if sha256_of_file(first) != entry.sha256:
                continue  # damaged since it was written; `verify` says so
            scratch = place.with_name(f".{place.name}.{uuid4().hex[:8]}.link")
            try:
                os.link(first, scratch)
                scratch.replace(place)
            except OSError:
                scratch.unlink(missing_ok=True)
                continue
            saved += entry.bytes
    return saved
