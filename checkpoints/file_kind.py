"""What a file really is, told by its first bytes: names lie, and half of all bad checkpoints are another format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..stages.plain_file import open_plain

SAFE_COPY: Final = (
    "pickles can run code and are not opened; make a safe copy first: "
    "python -c \"import sys, torch, safetensors.torch as st; w = torch.load(sys.argv[1], map_location='cpu', "
    "weights_only=True); st.save_file({k: v.clone().contiguous() for k, v in w.get('state_dict', w).items()}, "
    'sys.argv[2])" OLD NEW.safetensors'
)
DOWNLOAD: Final = "download the file itself, and compare its size and sha256 with those on its page"
FOLDER: Final = "give a diffusers folder (model_index.json, unet/, vae/, text_encoder/, ...)"


@dataclass(frozen=True, slots=True)
class ForeignFile:
    """A file that is no safetensors file."""

    what: str
    hint: str


# (first bytes, what they mean, what to do). Lower-case comparison for the textual ones: see `describe_foreign`.
_MAGIC: Final[tuple[tuple[bytes, str, str], ...]] = (
    (b"PK\x03\x04", "a pickle in a zip archive, as torch.save writes it", SAFE_COPY),
    (b"\x80\x02", "a Python pickle", SAFE_COPY),
    (b"\x80\x03", "a Python pickle", SAFE_COPY),
    (b"\x80\x04", "a Python pickle", SAFE_COPY),
    (b"\x80\x05", "a Python pickle", SAFE_COPY),
    (b"GGUF", "a GGUF file (llama.cpp, stable-diffusion.cpp)", FOLDER),
    (b"version https://git-lfs", "a Git LFS pointer: the weights were never downloaded", "run: git lfs pull"),
    (b"<!doctype html", "an HTML page", DOWNLOAD),
    (b"<html", "an HTML page", DOWNLOAD),
    (b"<?xml", "an XML page", DOWNLOAD),
    (b'{"error', "a JSON error message", DOWNLOAD),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it first"),
    (b"\x89HDF", "an HDF5 file (Keras)", FOLDER),
)
# its first key, as every writer has it: a text (type 8) of up to 255 bytes; ggml/docs/gguf.md
_GGUF_ARCHITECTURE: Final = re.compile(rb"general\.architecture\x08\0{3}(.)\0{7}", re.DOTALL)
_ONNX_IR_VERSION_FIELD: Final = b"\x08"  # ModelProto.ir_version: field 1, a varint, which writers put first


def describe_foreign(file: Path) -> ForeignFile | None:
    """Tell what `file` is if its first bytes (or, for ONNX, which has no magic number, its name) rule out safetensors.

    Raises:
        OSError: the file cannot be read, or is a pipe, a device or the like.
    """
    with open_plain(file) as stream:
        head = stream.read(512)
    if not head:
        return ForeignFile("an empty file", DOWNLOAD)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, what, hint in _MAGIC:
        if head.startswith(magic) or (magic[:1] in b"<{v" and text.startswith(magic)):
            return ForeignFile(what + _architecture(head), hint)
    if head[4:8] == b"TFL3":
        return ForeignFile("a TensorFlow Lite model", FOLDER)
    if file.suffix == ".onnx" and head.startswith(_ONNX_IR_VERSION_FIELD):
        return ForeignFile("an ONNX model, already exported", "give the PyTorch checkpoint that it was made from")
    return None


def _architecture(head: bytes) -> str:
    """Of a GGUF file, what model is in it."""
    found = _GGUF_ARCHITECTURE.search(head) if head.startswith(b"GGUF") else None
    name = head[found.end() : found.end() + found[1][0]] if found else b""
    return f" of the architecture {name.decode(errors='replace')!r}" if name else ""
