"""What a path is: also for graphs that say little, and for files that are none."""

from __future__ import annotations

import errno
from pathlib import Path

import onnx
import pytest
from diffusette.convert.describe import describe
from diffusette.stages.errors import CheckpointError, ModelError
from onnx import TensorProto, ValueInfoProto, helper

from ..bundle.tiny_bundle import write_onnx


def test_a_graph_is_described_without_its_weights(tmp_path: Path) -> None:
    write_onnx(tmp_path / "model.onnx")
    facts = describe(str(tmp_path / "model.onnx"))
    assert (facts["kind"], facts["opset"], facts["nodes"], facts["ops"]) == ("onnx", 18, 1, {"Add": 1})
    assert facts["inputs"] == [{"name": "x", "dtype": "float32", "shape": [16]}]


@pytest.mark.parametrize(("content", "words"), [(b"", "no nodes in it"), (b"<!doctype html>", "is not an ONNX file")])
def test_a_file_that_is_no_graph_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=words) as caught:
        describe(str(tmp_path / "model.onnx"))
    assert caught.value.hint


def test_a_graph_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "model.onnx").write_bytes(b"x")
    monkeypatch.setattr(onnx, "load", refuse)
    with pytest.raises(ModelError, match=r"model.onnx: cannot be read: Permission denied"):
        describe(str(tmp_path / "model.onnx"))


def test_what_a_graph_does_not_say_is_unknown(tmp_path: Path) -> None:
    inputs = [
        helper.make_tensor_sequence_value_info("frames", TensorProto.FLOAT, [1]),
        ValueInfoProto(name="untyped"),
        helper.make_tensor_value_info("undefined", TensorProto.UNDEFINED, [2]),
        helper.make_tensor_value_info("shapeless", TensorProto.FLOAT16, None),
        helper.make_tensor_value_info("free", TensorProto.INT64, ["batch", None, 0]),
    ]
    inputs[2].type.tensor_type.elem_type = 99
    graph = helper.make_graph([helper.make_node("Identity", ["free"], ["y"])], "g", inputs, [])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    found = describe(str(tmp_path / "model.onnx"))["inputs"]
    assert [(value["name"], value["dtype"], value["shape"]) for value in found] == [
        ("frames", "unknown", "unknown"),
        ("untyped", "unknown", "unknown"),
        ("undefined", "unknown", [2]),
        ("shapeless", "float16", "unknown"),
        ("free", "int64", ["batch", "unknown", 0]),
    ]


@pytest.mark.parametrize("suffix", ["", ".onnx"])
def test_a_path_that_no_file_system_takes_is_refused(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="File name too long"):
        describe(str(tmp_path / ("x" * 300 + suffix)))
