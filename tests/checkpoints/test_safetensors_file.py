from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from diffusette.checkpoints.safetensors_file import MAX_HEADER_BYTES, read_header, read_tensor
from diffusette.stages.errors import CheckpointError
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ..models import raw_safetensors


def entry(shape: list[Any], start: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "uint8", "bool"])
def test_tensors_read_by_offset_equal_those_that_safetensors_wrote(dtype: str, tmp_path: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "a": np.arange(6).reshape(2, 3).astype(dtype),
        "scalar": np.array(1, dtype),
        "empty": np.zeros((0, 4), dtype),
    }
    save_file(arrays, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert set(header) == set(arrays)
    for name, values in arrays.items():
        read = read_tensor(header[name])
        assert read.dtype == values.dtype
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read, values)


def test_bfloat16_is_read_bit_by_bit(tmp_path: Path) -> None:
    values = np.array([1.5, -2.25, 3e38], ml_dtypes.bfloat16)
    file = raw_safetensors(tmp_path / "x.safetensors", {"a": entry([3], 0, 6, "BF16")}, values.tobytes())
    np.testing.assert_array_equal(read_tensor(read_header(file)["a"]).view(np.uint16), values.view(np.uint16))


def test_order_is_that_of_the_bytes_whatever_the_header_says(tmp_path: Path) -> None:
    header = {"b": entry([1], 4, 8), "a": entry([1], 0, 4)}
    assert list(read_header(raw_safetensors(tmp_path / "x.safetensors", header, bytes(8)))) == ["a", "b"]


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry([4], 0, 16)}, 12, r"weights end at byte \d+, header promises \d+"),
        ({"a": entry([4], 0, 16)}, 17, "1 bytes follow the last tensor"),
        ({"a": entry([4], 4, 20)}, 20, "leaves a hole"),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12, "'b' leaves a hole"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "'b' overlaps"),
        ({"a": entry([3], 0, 16)}, 16, r"shape \[3\] of float32 does not fill its 16 bytes"),
        ({"a": entry([4], 16, 0)}, 16, "data_offsets"),
        ({"a": entry([-4], 0, -16)}, 16, "data_offsets"),
        ({"a": entry([True], 0, 4)}, 4, "shape"),
        ({"a": entry([1] * 65, 0, 4)}, 4, "shape"),
        ({"a": entry([1.0], 0, 4)}, 4, "shape"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "lacks dtype, shape or data_offsets"),
        ({"a": [1]}, 4, "lacks dtype, shape or data_offsets"),
        ({"a": entry([4], 0, 2, "F4")}, 2, "has dtype 'F4'"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
        (b'{"a": {}, "a": {}}', 0, "key 'a' occurs twice"),
        (b" {}", 0, "starts with b' '"),
        (b"[]", 0, "starts with"),
        (b'{"a": ', 0, "not valid JSON"),
        (b'{"\xff": 1}', 0, "not valid JSON"),
        (b'{"a":' + b"[" * 100_000, 0, "not valid JSON"),
    ],
)
def test_a_header_that_breaks_a_rule_is_refused(header: Any, data: int, message: str, tmp_path: Path) -> None:
    file = raw_safetensors(tmp_path / "x.safetensors", header, bytes(data))
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_header(file)
    assert str(file) in refusal.value.what


def test_a_header_longer_than_the_file_or_the_limit_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes((1000).to_bytes(8, "little") + b"{")
    with pytest.raises(CheckpointError, match="ends at byte 9, its header alone promises 1008"):
        read_header(file)
    file.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="over the format's limit"):
        read_header(file)
    file.write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="4 bytes"):
        read_header(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"\n<!DOCTYPE html><title>404</title>", "HTML page"),
        (b"<html>Sign in</html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"PK\x03\x04 torch", "pickle in a zip archive"),
        (b"\x80\x02}q\x00.", "Python pickle"),
        (b"\x80\x04\x95", "Python pickle"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b'{"error":"Repository not found"}', "JSON error message"),
        (b"\x1f\x8b\x08", "gzip"),
    ],
)
def test_other_formats_under_this_name_are_called_what_they_are(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_header(file)
    assert refusal.value.hint


def test_a_file_that_shrinks_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    save_file({"a": np.zeros(100, np.float32)}, tmp_path / "x.safetensors")
    tensor = read_header(tmp_path / "x.safetensors")["a"]
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="98 of 100 values"):
        read_tensor(tensor)
