"""A page on disk: whole or not at all, and never over a file that is not a page of ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from ...stages.errors import UsageError
from ...stages.publish import written

SUFFIXES: Final = (".html", ".htm")
_MARK: Final = b'<meta name="generator" content="diffusette '
_HEAD: Final = 1024  # bytes; the mark stands in the first lines


def refuse_unwritable_page(file: Path) -> None:
    """Refuse before any work what `write_page` would refuse after it.

    A page of ours is replaced without a question, since the same command is run again and again; anything else that
    somebody has at this place is not.

    Raises:
        UsageError: the name does not end in .html, is a folder, holds something else, or cannot be written.
    """
    try:
        if file.suffix.lower() not in SUFFIXES or file.is_dir():
            example = file / "report.html" if file.is_dir() else file.with_name(f"{file.stem or 'report'}.html")
            raise UsageError(
                f"{file}: {'is a folder' if file.is_dir() else 'pages are written as .html'}", hint=f"try {example}"
            )
        if file.exists():
            with file.open("rb") as stream:
                if _MARK not in stream.read(_HEAD):
                    raise UsageError(
                        f"{file}: exists and is not a page that diffusette wrote", hint="choose another name"
                    )
        above = next(folder for folder in file.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UsageError(f"{file}: {above} cannot be written to", hint="choose another place")
    except OSError as error:
        raise UsageError(f"{file}: cannot be written: {error.strerror}", hint="choose another name") from None


def write_page(file: Path, text: str) -> None:
    """Write by one rename.

    Raises:
        UsageError, NoRoom: as `refuse_unwritable_page`, and where the disk is full.
    """
    refuse_unwritable_page(file)
    with written(file) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="\n")
