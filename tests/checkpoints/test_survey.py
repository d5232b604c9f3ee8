from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from diffusette.checkpoints import survey as survey_module
from diffusette.checkpoints.survey import NonFinite, refuse_non_finite, survey
from diffusette.stages.errors import CheckpointError, NoRoom
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ..models import poison, raw_safetensors


@pytest.fixture
def file(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {
        "small": random.standard_normal(7, np.float32),
        "large": random.standard_normal((300, 700), np.float32),
        "half": random.standard_normal(33).astype(np.float16),
        "ids": np.arange(5),
    }
    arrays["large"][3, 4] = -77.5
    save_file(arrays, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.fixture(params=[16 * 2**20, 4096], ids=["one chunk", "many chunks"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_module, "CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("chunked")
def test_one_pass_gives_the_hash_of_the_file_and_its_largest_weight(file: Path) -> None:
    found = survey(file)
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (found.abs_max, found.abs_max_tensor, found.non_finite) == (77.5, "large", None)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_found_counted_and_refused(value: float, file: Path) -> None:
    for index in (200_001, 70_000, 70_001):
        poison(file, "large", index, value)
    found = survey(file)
    assert found.non_finite == NonFinite("large", 70_000, 3, 1)
    with pytest.raises(CheckpointError, match="'large' holds 3 NaN or infinite values, the first at 70000"):
        refuse_non_finite(file, found)


def test_every_tensor_with_non_finite_weights_is_counted(file: Path) -> None:
    poison(file, "large", 0, np.nan)
    poison(file, "small", 2, np.inf)
    found = survey(file)
    assert found.non_finite is not None
    assert found.non_finite.tensors == 2


@pytest.mark.parametrize(
    ("word", "dtype"), [("F64", np.float64), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16), ("F32", np.float32)]
)
def test_every_float_dtype_is_scanned(word: str, dtype: Any, tmp_path: Path) -> None:
    values = np.array([1, -3, 2, 0], dtype)
    header = {"a": {"dtype": word, "shape": [4], "data_offsets": [0, values.nbytes]}}
    file = raw_safetensors(tmp_path / "finite.safetensors", header, values.tobytes())
    assert survey(file).abs_max == 3
    largest = np.array([ml_dtypes.finfo(dtype).max], dtype)
    values[1] = largest[0]
    file = raw_safetensors(tmp_path / "largest.safetensors", header, values.tobytes())
    assert survey(file).abs_max == float(largest[0])
    values[2] = np.nan
    file = raw_safetensors(tmp_path / "nan.safetensors", header, values.tobytes())
    assert survey(file).non_finite == NonFinite("a", 2, 1, 1)


def test_an_unchanged_file_is_read_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = survey(file, memo=tmp_path / "memo")

    def must_not_run(*_: object) -> None:
        raise AssertionError("the file was read again")

    monkeypatch.setattr(survey_module, "_one_pass", must_not_run)
    assert survey(file, memo=tmp_path / "memo") == first
    link = tmp_path / "link.safetensors"
    link.symlink_to(file)
    assert survey(link, memo=tmp_path / "memo") == first


def test_a_changed_file_is_read_again_though_size_and_mtime_are_kept(file: Path, tmp_path: Path) -> None:
    import os

    survey(file, memo=tmp_path / "memo")
    before = file.stat()
    poison(file, "large", 9, np.nan)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert survey(file, memo=tmp_path / "memo").non_finite == NonFinite("large", 9, 1, 1)


@pytest.mark.parametrize("content", [b"", b'{"sha256": "0', b"{}", b'{"sha256": 1}'])
def test_a_damaged_memo_is_replaced(content: bytes, file: Path, tmp_path: Path) -> None:
    first = survey(file, memo=tmp_path / "memo")
    (entry,) = (tmp_path / "memo").iterdir()
    entry.write_bytes(content)
    assert survey(file, memo=tmp_path / "memo") == first
    assert entry.read_bytes() != content


def test_a_memo_that_cannot_be_written_is_an_error(file: Path, tmp_path: Path) -> None:
    (tmp_path / "memo").write_text("a file where the folder belongs")
    with pytest.raises(NoRoom, match="memo: cannot be written"):
        survey(file, memo=tmp_path / "memo")


def test_a_file_that_changes_under_the_pass_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = survey_module._one_pass

    def rewriting(*arguments: Any) -> survey_module.Survey:
        found = genuine(*arguments)
        poison(file, "large", 0, 1.0)
        return found

    monkeypatch.setattr(survey_module, "_one_pass", rewriting)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        survey(file)
