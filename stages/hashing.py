"""Digests: sha256 of files, and of JSON values in the canonical form of RFC 8785."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


def sha256_of_file(file: Path) -> str:
    """sha256 of a file's bytes, hex, read in blocks."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """sha256 of a JSON-able value, hex; equal values give equal digests whatever their key order."""
    import rfc8785

    return hashlib.sha256(rfc8785.dumps(value)).hexdigest()
