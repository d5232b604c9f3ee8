"""The reader of ONNX files says what the package onnx says, and refuses what parsers differ about."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from diffusette.bundle.bundle import Bundle
from diffusette.bundle.stray_weights import stray_weights
from diffusette.stages import onnx_file
from diffusette.stages.errors import BundleError
from diffusette.stages.onnx_file import BITS, read_onnx
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper


def messages_below(descriptor: Any, known: dict[str, dict[int, str]]) -> dict[str, dict[int, str]]:
    """Fields of message type that lead to a TensorProto, by protobuf's own description."""
    if descriptor.name not in known:
        inner = {f.number: f.message_type for f in descriptor.fields if f.message_type is not None}
        known[descriptor.name] = {number: kind.name for number, kind in inner.items()}
        for kind in inner.values():
            messages_below(kind, known)
    return known


def test_every_way_to_a_tensor_is_walked() -> None:
    every = messages_below(onnx.ModelProto.DESCRIPTOR, {})
    leading = {"TensorProto"}
    while more := {name for name, below in every.items() if leading & set(below.values())} - leading:
        leading |= more
    wanted = {
        name: {number: kind for number, kind in every[name].items() if kind in leading and name != "TensorProto"}
        for name in leading
    }
    assert wanted == onnx_file._BELOW


def test_bits_are_those_of_the_package() -> None:
    for name, number in TensorProto.DataType.items():
        if name in ("UNDEFINED", "STRING", "FLOAT6E2M3", "FLOAT6E3M2"):
            assert number not in BITS
        elif name in ("INT2", "UINT2", "INT4", "UINT4"):  # numpy has no type of two or four bits
            assert BITS[number] == int(name[-1])
        elif name == "FLOAT4E2M1":
            assert BITS[number] == 4
        else:
            assert BITS[number] == 8 * helper.tensor_dtype_to_np_dtype(number).itemsize, name


def test_it_says_what_the_package_says(bundle: Bundle) -> None:
    for file in sorted(bundle.path.rglob("*.onnx")):
        model, found = onnx.load(file, load_external_data=False), read_onnx(file)
        assert [(node.op, node.name, list(node.inputs), list(node.outputs)) for node in found.nodes] == [
            (node.op_type, node.name, list(node.input), list(node.output)) for node in model.graph.node
        ]
        assert [node.module for node in found.nodes] == [
            next((entry.value for entry in node.metadata_props if entry.key == "module"), "")
            for node in model.graph.node
        ]
        assert [
            (t.name, t.data_type, list(t.dims), t.external, dict(t.place)) for t in found.initializers
        ] == [
            (t.name, t.data_type, list(t.dims), t.data_location == 1, {e.key: e.value for e in t.external_data})
            for t in model.graph.initializer
        ]  # fmt: skip
        assert len(found.tensors) >= len(found.initializers)


def stray() -> onnx.TensorProto:
    tensor = TensorProto(name="s", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    return tensor


def hiding_places() -> Iterator[onnx.ModelProto]:
    """One model for each kind of place in which a tensor can stand."""
    sparse = onnx.SparseTensorProto(indices=stray(), dims=[1])
    yield onnx.ModelProto(graph=onnx.GraphProto(initializer=[stray()]))
    yield onnx.ModelProto(graph=onnx.GraphProto(sparse_initializer=[sparse]))
    for attribute in (
        onnx.AttributeProto(name="a", t=stray()),
        onnx.AttributeProto(name="a", tensors=[stray()]),
        onnx.AttributeProto(name="a", g=onnx.GraphProto(initializer=[stray()])),
        onnx.AttributeProto(name="a", graphs=[onnx.GraphProto(initializer=[stray()])]),
        onnx.AttributeProto(name="a", sparse_tensor=sparse),
        onnx.AttributeProto(name="a", sparse_tensors=[sparse]),
    ):
        node = onnx.NodeProto(attribute=[attribute])
        yield onnx.ModelProto(graph=onnx.GraphProto(node=[node]))
        yield onnx.ModelProto(functions=[onnx.FunctionProto(node=[node])])
        yield onnx.ModelProto(functions=[onnx.FunctionProto(attribute_proto=[attribute])])
    for name in ("initialization", "algorithm"):
        yield onnx.ModelProto(training_info=[onnx.TrainingInfoProto(**{name: onnx.GraphProto(initializer=[stray()])})])


def test_a_tensor_is_found_wherever_it_hides(tmp_path: Path) -> None:
    for model in hiding_places():
        (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
        assert stray_weights(tmp_path, ["model.onnx"]) == [("model.onnx", "../secret")]


def field(number: int, content: bytes) -> bytes:
    """A field of bytes, of a length below 2^14."""
    size = len(content)
    return (
        bytes([number << 3 & 127 | 2 | (128 if number > 15 else 0)])
        + (bytes([number >> 4]) if number > 15 else b"")
        + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7]))
        + content
    )


def tensor_bytes() -> bytes:
    return stray().SerializeToString()


@pytest.mark.parametrize(
    "tensor",
    [
        tensor_bytes(),
        tensor_bytes() + b"\x70\x00",  # data_location once more: DEFAULT
        tensor_bytes() + b"\x70\x05",  # a value that protobuf does not know, and passes over
        tensor_bytes().replace(b"\x70\x01", b"\x70\x81\x80\x80\x80\x10"),  # 1 + 2^32, which an enum cuts to 1
        tensor_bytes().replace(b"\x70\x01", b""),
        tensor_bytes() + stray().SerializeToString().replace(b"../secret", b"./w.data."),  # two places
    ],
)
def test_a_place_is_seen_however_it_is_spelled(tensor: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(field(7, field(5, tensor)))
    assert ("model.onnx", "../secret") in stray_weights(tmp_path, ["model.onnx", "w.data."])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x3a\xff\xff\xff\xff\x0f", "bytes at byte"),  # a graph of 4 GB
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "bytes at byte"),  # of 2^64 - 1 bytes
        (b"\x3a\x05\x2a", "bytes at byte"),
        (b"\x3a", "without an end"),
        (b"\x08\xff", "without an end"),
        (b"\xff" * 64, "without an end"),
        (b"\x3b\x3c", "wire type 3"),  # a group
        (b"\xba\x80\x80\x80\x80\x00\x00", "without an end"),  # a graph, by a key of six bytes
        (b"\xba\x80\x80\x80\x10\x00", "field number"),  # by a key of 33 bits
        (b"\x02\x00", "field number 0"),
        (b"\x38\x01", "a number where"),  # a graph that is a number
        (field(7, field(5, b"\x72\x00")), "where a number belongs"),  # data_location in bytes
        (field(7, field(5, b"\x08\x01" * 65)), "65 dimensions"),
    ],
)
def test_what_parsers_differ_about_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(BundleError, match=f"holds no ONNX graph: .*{said}"):
        read_onnx(file)


def nested(levels: int) -> bytes:
    """A graph in an attribute of a node of a graph, and so on."""
    content = field(5, tensor_bytes())
    for _ in range(levels):
        content = field(1, field(5, field(6, content)))
    return field(7, content)


def test_depth_ends_where_protobuf_ends(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(nested(30))
    assert stray_weights(tmp_path, ["model.onnx"])
    file.write_bytes(nested(40))
    with pytest.raises(BundleError, match="100 messages in each other"):
        read_onnx(file)


def test_a_million_tensors_are_refused_before_they_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "_MOST", 1000)
    file = tmp_path / "model.onnx"
    file.write_bytes(field(7, b"\x2a\x00" * 1000))
    assert len(read_onnx(file).tensors) == 1000
    file.write_bytes(field(7, b"\x2a\x00" * 1001))
    with pytest.raises(BundleError, match="1000 tensors"):
        read_onnx(file)


@given(content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """And what is read, protobuf reads too: never a file that one of both takes for another's."""
    file = tmp_path_factory.getbasetemp() / "any.onnx"
    file.write_bytes(field(7, content))
    try:
        found = read_onnx(file)
    except BundleError:
        return
    model = onnx.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except Exception:  # noqa: BLE001 - protobuf's own, of a class that depends on its implementation
        return  # a runtime refuses it
    external = [t for t in model.graph.initializer if t.data_location == 1 or t.external_data]
    assert len(external) <= len([t for t in found.tensors if t.external or t.place])
