"""Checkpoints that torch.save wrote (`.ckpt`, `.pt`): where their tensors lie, found without running what is in them.

A pickle can name any function to call. Names are looked at first, without unpickling; then a child process with limits
lets torch's weights-only unpickler read the structure, and no tensor. Tensors lie uncompressed in the zip archive, so
they are read by offset like those of a safetensors file.
"""

from __future__ import annotations

import json
import pickletools
import re
import subprocess
import sys
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from ..stages.artifacts import StoredTensor
from ..stages.errors import CheckpointError
from ..stages.plain_file import open_plain
from .file_kind import SAFE_COPY
from .safetensors_file import DTYPES

SUFFIXES: Final = (".ckpt", ".pt", ".pth", ".bin")
SECONDS: Final = 120  # for a structure: a UNet's takes under a second once torch is loaded
MEMORY: Final = 8 * 2**30  # bytes of data; torch itself takes about one
MAX_STRUCTURE: Final = 256 * 2**20  # bytes of data.pkl; that of a Stable Diffusion checkpoint has 0.3 MB
# What torch.save writes for tensors. Anything else is named in the refusal.
_HARMLESS: Final = re.compile(
    r"torch\._utils\._rebuild_(tensor(_v2)?|parameter)|torch\.\w+Storage|torch\.(Size|device|float\d+|bfloat16|int\d+)"
    r"|collections\.OrderedDict|torch\.nn\.parameter\.Parameter|torch\.storage\.(UntypedStorage|_load_from_bytes)"
    r"|torch\.serialization\._get_layout|_codecs\.encode|numpy(\._core|\.core)?\.multiarray\.scalar|numpy\.dtype"
)
_DTYPE_NAMES: Final = set(DTYPES.values())


def is_pickled(file: Path) -> bool:
    """Whether torch.save could have written `file`: by its first bytes, and for bare pickles by its name too."""
    with open_plain(file) as stream:
        head = stream.read(4)
    return head == b"PK\x03\x04" or (file.suffix in SUFFIXES and head[:1] == b"\x80")


def read_pickled(file: Path) -> dict[str, StoredTensor]:
    """Name -> tensor, as `safetensors_file.read_header`; `state_dict` is unwrapped.

    Raises:
        CheckpointError: it would run code (says which), is no archive of torch, is damaged, or lays a tensor out so
            that it cannot be read by offset.
    """
    return dict(_read(file, _identity(file)))


def _identity(file: Path) -> tuple[int, ...]:
    state = file.stat()
    return state.st_size, state.st_mtime_ns, state.st_ino


def spelled_in(file: Path) -> tuple[str, ...]:
    """Every text in the structure, names of tensors among them, in its order: by listing opcodes, without a child.

    Enough to say what a file is that is no checkpoint, in a tenth of the time.

    Raises:
        CheckpointError: as `read_pickled`, but for what only the child can tell.
    """
    return _look_over(file, _identity(file))


@lru_cache(maxsize=8)  # a checkpoint is asked several times what it is
def _read(file: Path, identity: tuple[int, ...]) -> dict[str, StoredTensor]:
    _look_over(file, identity)
    answer = _ask(file)
    if answer["refused"]:
        raise CheckpointError(
            f"{file}: a pickle that torch's weights-only unpickler refuses: {answer['refused'].splitlines()[0]}",
            hint="get a .safetensors of it, or one whose authors saved only its weights",
        )
    found = {}
    size = identity[0]
    for name, dtype, shape, start, length, transposed, stride in answer["tensors"]:
        if dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"{file}: {name!r} is stored as {dtype}", hint="weights must be floating-point")
        if start is None:
            raise CheckpointError(f"{file}: {name!r} is stored with strides {stride}", hint=SAFE_COPY)
        if start + length > size:
            raise CheckpointError(
                f"{file}: {name!r} ends at byte {start + length}, the file at {size}: it is cut short"
            )
        found[name] = StoredTensor(file, name, dtype, tuple(shape), start, length, transposed)
    if not found:
        raise CheckpointError(f"{file}: a pickle without any tensor", hint="it is no checkpoint")
    return found


@lru_cache(maxsize=8)
def _look_over(file: Path, identity: tuple[int, ...]) -> tuple[str, ...]:
    """The texts of the pickle. Raises if it names anything but what tensors are made of; nothing in it is run."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            order = [name for name in archive.namelist() if name.endswith("/byteorder")]
            if len(names) != 1:
                raise CheckpointError(f"{file}: a zip archive that torch.save did not write", hint=SAFE_COPY)
            if archive.getinfo(names[0]).file_size > MAX_STRUCTURE:
                raise CheckpointError(
                    f"{file}: the structure alone has over {MAX_STRUCTURE} bytes, a checkpoint's has 300 kB",
                    hint="do not open it anywhere; get a .safetensors of it",
                )
            structure = archive.read(names[0])
            if order and archive.read(order[0]) != b"little":
                raise CheckpointError(f"{file}: written on a big-endian machine", hint=SAFE_COPY)
    except zipfile.BadZipFile:
        raise _no_archive(file) from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}", hint="check its rights") from error
    called, texts = _listed(structure, file)
    strange = sorted(name for name in called if not _HARMLESS.fullmatch(name))
    if strange:
        raise CheckpointError(
            f"{file}: a pickle that runs code: it calls {', '.join(strange[:5])}",
            hint="do not open it anywhere; get a .safetensors of it",
        )
    return texts


def _no_archive(file: Path) -> CheckpointError:
    """An archive's directory lies at its end: without one, a zip archive was cut short."""
    with open_plain(file) as stream:
        is_zip = stream.read(2) == b"PK"
    if is_zip:
        return CheckpointError(
            f"{file}: a zip archive, as torch.save writes it, without its end: cut short, or damaged",
            hint="download it again",
        )
    return CheckpointError(
        f"{file}: a Python pickle of the form that torch wrote before 1.6, which cannot be read by offset",
        hint=SAFE_COPY,
    )


def _listed(structure: bytes, file: Path) -> tuple[set[str], tuple[str, ...]]:
    """What its opcodes would call, and their texts."""
    found: set[str] = set()
    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(structure):
            if opcode.name in ("GLOBAL", "INST"):
                found.add(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":  # torch does not write it; the last two texts are its usual operands
                found.add(".".join(texts[-2:]))
            elif isinstance(argument, str):
                texts.append(argument)
    except ValueError as error:
        raise CheckpointError(f"{file}: its pickle is damaged: {error}", hint="download it again") from None
    return found, tuple(texts)


def _ask(file: Path) -> Any:
    """Let the child read the structure.

    Raises:
        CheckpointError: it died, or took more than its limits.
    """
    command = [sys.executable, "-P", "-m", "diffusette.checkpoints.unpickle", str(file)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, preexec_fn=_limit, check=False)
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{file}: its structure takes over {SECONDS} s to read", hint=SAFE_COPY) from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise CheckpointError(
            f"{file}: reading its structure ended with status {done.returncode}: {said[-1] if said else 'no word'}",
            hint=SAFE_COPY,
        )
    return json.loads(done.stdout)


def _limit() -> None:
    """In the child, before it starts: memory, time, and no file written."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
