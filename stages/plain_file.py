"""Reading files that strangers made: only plain ones, and never more than was expected.

Opening a pipe waits for a writer that never comes, and `/dev/zero` has no end; a link in a downloaded folder may lead
to either. A file of holes claims a petabyte and costs nothing to send.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

MAX_TEXT: Final = 64 * 2**20
"""Bytes of a JSON file: the largest that checkpoints have, a tokenizer.json, takes 20 MB."""


def open_plain(file: Path) -> BinaryIO:
    """Open `file`, or what it links to, for reading, without ever waiting.

    Raises:
        OSError: the system refuses it, or it is a pipe, a device, a socket or a folder.
    """
    # O_NONBLOCK: a pipe opens at once, and is then told apart; it means nothing for plain files, open(2)
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        raise OSError(errno.EINVAL, "is not a plain file", str(file))
    return os.fdopen(descriptor, "rb")


def read_plain(file: Path, limit: int = MAX_TEXT) -> bytes:
    """All bytes of `file`.

    Raises:
        OSError: as `open_plain`, or it has more than `limit` bytes.
    """
    with open_plain(file) as stream:
        content = stream.read(limit + 1)
        if len(content) <= limit:
            return content
        size = os.fstat(stream.fileno()).st_size
        raise OSError(errno.EFBIG, f"{size} bytes, at most {limit} are read", str(file))
