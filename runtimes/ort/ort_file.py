"""Equal models as equal bytes: the one part of a `.ort` file that ONNX Runtime writes in another order each time.

A `.ort` file is a flatbuffer (onnxruntime, core/flatbuffers/schema/ort.fbs) with two children of its root: the model,
always written alike, and behind it the table of kernel types, whose entries lie in the order of a hash table that is
seeded with an address. Flatbuffers grow from back to front, so that table and the root are the first few kilobytes
of the file. They are written again, entries in the order of their names; the model is copied as it is. Some orders of
the table take eight bytes more than others, about one of a hundred: where the model begins must not depend on it.
"""

from __future__ import annotations

import mmap
import shutil
import struct
from pathlib import Path
from typing import Any, Final

from ...stages.errors import ModelError

_IDENTIFIER: Final = b"ORTM"
_MODEL_SLOT: Final = 6  # of the root's vtable: 4 + 2 x the place of `model` among the fields of InferenceSession

_ALIGNMENT: Final = 64  # at least that of everything in the schema
_ANYWHERE: Final = 2**30  # a place of the model, to learn how long what stands before it is
_CHUNK: Final = 8 * 2**20

# An entry: operator, and for each of its type parameters the arguments that have it as (kind, index).
Kernels = dict[bytes, dict[bytes, list[tuple[int, int]]]]


def put_in_order(source: Path, target: Path) -> None:
    """Copy the `.ort` file `source` to `target` with its front written in order. Of a copy, it makes the same bytes.

    Raises:
        ModelError: `source` is not laid out as this module expects.
    """
    with source.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[4:8] != _IDENTIFIER:
            raise ModelError(f"{source}: no .ort file: it begins with {bytes(content[:8])!r}")
        version, kernels, model = _read(content)
        vtable = model - struct.unpack_from("<i", content, model)[0]
        old = min(model, vtable)  # a table's vtable lies before it, unless it is shared with one further back
        # A flatbuffer is aligned from its end, so its model may begin wherever the whole is a multiple of that.
        length = len(_front(version, kernels, _ANYWHERE))
        new = length + -(length + len(content) - old) % _ALIGNMENT
        front = _front(version, kernels, model + new - old)
        with target.open("xb") as copy:
            copy.write(front.ljust(new, b"\0"))
            stream.seek(old)
            shutil.copyfileobj(stream, copy, _CHUNK)
    with target.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if _read(content) != (version, kernels, model + new - old):
            raise ModelError(f"{target}: its kernels were not written as they were read", hint="report this as a bug")


def schema(table: str) -> Any:
    """A class of the schema, as the flatbuffers compiler made it for onnxruntime's tools."""
    from importlib import import_module

    from onnxruntime.tools.ort_format_model import ort_model_processor  # puts the package on the path

    return import_module(f"{ort_model_processor.fbs.__name__}.{table}")


def _read(content: Any) -> tuple[bytes, Kernels, int]:
    """ORT's format version, the kernels, and where the model begins."""
    root = schema("InferenceSession").InferenceSession.GetRootAs(content, 0)
    resolver = root.KernelTypeStrResolver()
    kernels: Kernels = {}
    for place in range(resolver.OpKernelTypeStrArgsLength()):
        entry = resolver.OpKernelTypeStrArgs(place)
        kernels[entry.OpId()] = types = {}
        for number in range(entry.KernelTypeStrArgsLength()):
            kind = entry.KernelTypeStrArgs(number)
            arguments = [kind.Args(index) for index in range(kind.ArgsLength())]
            types[kind.KernelTypeStr()] = [(argument.ArgType(), argument.Index()) for argument in arguments]
    return root.OrtVersion(), kernels, root.Model()._tab.Pos


def _front(version: bytes, kernels: Kernels, model: int) -> bytes:
    """Root and kernels as a flatbuffer, in which the root's child lies at the byte `model` of the file."""
    import flatbuffers

    session, resolver = schema("InferenceSession"), schema("KernelTypeStrResolver")
    builder = flatbuffers.Builder(4096)
    entries = [_entry(builder, operator, kernels[operator]) for operator in sorted(kernels)]
    listed = offset_vector(builder, entries)
    resolver.Start(builder)
    resolver.AddOpKernelTypeStrArgs(builder, listed)
    resolved = resolver.End(builder)
    written = builder.CreateString(version)
    session.Start(builder)
    session.AddOrtVersion(builder, written)
    session.AddModel(builder, written)  # a placeholder: the model is outside of what the builder knows
    session.AddKernelTypeStrResolver(builder, resolved)
    builder.Finish(session.End(builder), file_identifier=_IDENTIFIER)
    front = bytearray(builder.Output())

    (root,) = struct.unpack_from("<I", front, 0)
    vtable = root - struct.unpack_from("<i", front, root)[0]
    field = root + struct.unpack_from("<H", front, vtable + _MODEL_SLOT)[0]
    struct.pack_into("<I", front, field, model - field)
    return bytes(front)


def _entry(builder: Any, operator: bytes, types: dict[bytes, list[tuple[int, int]]]) -> int:
    entry, kind = schema("OpIdKernelTypeStrArgsEntry"), schema("KernelTypeStrArgsEntry")
    argument = schema("ArgTypeAndIndex")
    kinds = []
    for name in sorted(types):
        arguments = []
        for arg_type, index in types[name]:
            argument.Start(builder)
            argument.AddArgType(builder, arg_type)
            argument.AddIndex(builder, index)
            arguments.append(argument.End(builder))
        listed, named = offset_vector(builder, arguments), builder.CreateSharedString(name)
        kind.Start(builder)
        kind.AddKernelTypeStr(builder, named)
        kind.AddArgs(builder, listed)
        kinds.append(kind.End(builder))
    listed, named = offset_vector(builder, kinds), builder.CreateSharedString(operator)
    entry.Start(builder)
    entry.AddOpId(builder, named)
    entry.AddKernelTypeStrArgs(builder, listed)
    return int(entry.End(builder))


def offset_vector(builder: Any, tables: list[int]) -> int:
    """A vector of what lies at the offsets `tables` of `builder`."""
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    return int(builder.EndVector())
