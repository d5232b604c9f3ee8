"""Checkpoints of strangers: whatever is in the folder, an answer or an error of the table."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from diffusette.checkpoints.checkpoint import DEMO_FOLDER, open_checkpoint
from diffusette.checkpoints.safetensors_file import read_header
from diffusette.cli import run
from diffusette.convert.recipe import parameters_of
from diffusette.stages.artifacts import Companions
from hypothesis import example, given

from ..ldm import ldm_tensors, original_pipeline, write_ldm
from ..models import TEXT_WEIGHTS, UNET_WEIGHTS, malicious_pickle, raw_safetensors
from .guard import ALLOWED, answer
from .hostile import as_json, cases, edited, nested, scratched, values

HEADER = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [16, 24]},
    "__metadata__": {"format": "pt"},
}
JSON_FILES = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)


def test_the_header_that_is_changed_below_is_whole(tmp_path: Path) -> None:
    assert answer(lambda: read_header(raw_safetensors(tmp_path / "x.safetensors", HEADER, bytes(24))), tmp_path) is None


@cases(400)
@given(header=edited(HEADER))
@example(header={"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}})
@example(header={"a": {"dtype": "F32", "shape": [2**63, 2**63, 0], "data_offsets": [0, 0]}})
@example(header={"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 2**66]}})
@example(header={"a": {"dtype": "F64", "shape": [10**15], "data_offsets": [0, 8 * 10**15]}})
@example(header={"\ud800": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}})
def test_headers_of_any_content(header: Any, tmp_path: Path) -> None:
    file = raw_safetensors(tmp_path / "x.safetensors", as_json(header), bytes(24))
    answer(lambda: read_header(file), tmp_path)


@cases(400)
@given(content=scratched(len(json.dumps(HEADER)).to_bytes(8, "little") + as_json(HEADER) + bytes(24)))
@example(content=(10**18).to_bytes(8, "little") + b"{}")
@example(content=(2 * 10**5).to_bytes(8, "little") + nested(10**5, '{"a":', "}").encode())
@example(content=(10**5).to_bytes(8, "little") + (b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**5)[: 10**5])
def test_files_of_any_bytes(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    answer(lambda: read_header(file), tmp_path)
    answer(lambda: open_checkpoint(file, survey=False), tmp_path)


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose JSON files each case rewrites."""
    return Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("fuzz") / "tiny"))


def look(folder: Path) -> None:
    """All that is read of a checkpoint before the first stage, but for the values of weights."""
    parameters_of(open_checkpoint(folder, survey=False))


@pytest.mark.parametrize("name", JSON_FILES)
def test_configs_of_any_content(name: str, folder: Path) -> None:
    file = folder / name
    whole = file.read_bytes()

    @cases(60)
    @given(document=edited(json.loads(whole)) | values)
    def any_content(document: Any) -> None:
        file.write_bytes(as_json(document))
        answer(lambda: look(folder), folder)

    try:
        any_content()
        for text in (nested(10**5), nested(10**5, '{"a":', "}"), "[" * 10**6, '{"a": 1' + "0" * 10**5 + "}", "\xff"):
            file.write_text(text, encoding="latin-1")
            assert answer(lambda: look(folder), folder) is not None
        os.truncate(file, 2**43)  # holes
        assert answer(lambda: look(folder), folder) is not None
    finally:
        file.unlink()
        file.write_bytes(whole)
    assert answer(lambda: look(folder), folder) is None


@pytest.mark.parametrize(("component", "part"), [("unet", "unet"), ("vae_decoder", "vae"), ("text_encoder",) * 2])
def test_configs_that_no_network_can_be_built_from(
    component: str, part: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """diffusers, transformers and torch build the network; what they trip over is the file's fault, not a bug."""
    from diffusette.checkpoints import network

    caplog.set_level(logging.ERROR, logger="diffusers")  # it warns of every key that it does not know
    file = folder / part / "config.json"
    whole = file.read_bytes()

    def build() -> None:
        with suppress(MemoryError):  # in the child of a stage this is `NoRoom`
            network.build(open_checkpoint(folder, survey=False).components[component])

    @cases(30)
    @given(document=edited(json.loads(whole)))
    def any_content(document: Any) -> None:
        file.write_bytes(as_json(document))
        answer(build, folder)

    build()  # what is imported for the first time is no matter of a case
    try:
        any_content()
    finally:
        file.write_bytes(whole)


def place(kind: str, at: Path, folder: Path) -> None:
    """Put something that is no plain file where one is expected."""
    at.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(at)
    elif kind == "endless device":
        at.symlink_to("/dev/zero")
    elif kind == "terminal":
        at.symlink_to("/dev/tty")
    elif kind == "link to itself":
        at.symlink_to(at)
    elif kind == "folder":
        at.mkdir()
    else:
        at.symlink_to(folder)


KINDS = ("pipe", "endless device", "terminal", "link to itself", "folder", "link to a folder")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*JSON_FILES, UNET_WEIGHTS, TEXT_WEIGHTS, "tokenizer/tokenizer.json"])
def test_what_is_no_file_is_not_read(kind: str, name: str, tiny_copy: Path) -> None:
    place(kind, tiny_copy / name, tiny_copy)
    answer(lambda: look(tiny_copy), tiny_copy)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["", ".safetensors", ".ckpt", ".onnx"])
def test_a_path_that_is_no_file_is_refused(kind: str, suffix: str, tmp_path: Path) -> None:
    at = tmp_path / f"x{suffix}"
    place(kind, at, tmp_path)
    assert answer(lambda: open_checkpoint(at, survey=False), tmp_path) is not None
    assert answer(lambda: describe(at), tmp_path) is not None


def describe(path: Path) -> None:
    from diffusette.convert.describe import describe

    describe(str(path))


@cases(150)
@given(index=edited({"metadata": {"total_size": 8}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
@example(index={"weight_map": {"a": "../one.safetensors"}})
@example(index={"weight_map": {"a": "/dev/zero"}})
@example(index={"weight_map": {"a": "pipe"}})
@example(index={"weight_map": {"a": "one\0.safetensors"}})
@example(index={"weight_map": {"a": "a" * 300}})
def test_shard_indexes_of_any_content(index: Any, tmp_path: Path) -> None:
    from diffusette.checkpoints.weight_files import find_weights

    for name in ("one", "two"):
        raw_safetensors(
            tmp_path / f"{name}.safetensors", {name[0]: {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}, b"1234"
        )
    if not (tmp_path / "pipe").exists():
        os.mkfifo(tmp_path / "pipe")
    (tmp_path / "model.safetensors.index.json").write_bytes(as_json(index))
    answer(lambda: find_weights(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "model.pth", "model.safetensors"])
def test_code_in_a_pickle_is_not_run(name: str, tmp_path: Path) -> None:
    file, marker = tmp_path / name, tmp_path / "ran"
    malicious_pickle(file, marker)
    assert answer(lambda: open_checkpoint(file, survey=False), tmp_path) is not None
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "diffusion_pytorch_model.safetensors"]
)
def test_code_in_the_weights_of_a_component_is_not_run(name: str, tiny_copy: Path) -> None:
    (tiny_copy / UNET_WEIGHTS).unlink()
    marker = tiny_copy / "ran"
    malicious_pickle(tiny_copy / "unet" / name, marker)
    assert answer(lambda: look(tiny_copy), tiny_copy) is not None
    assert not marker.exists()


def test_the_command_line_answers_with_a_code_of_the_table(
    folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = folder / "unet" / "config.json"
    whole = file.read_bytes()

    @cases(30)
    @given(document=edited(json.loads(whole)))
    def any_content(document: Any) -> None:
        file.write_bytes(as_json(document))
        code = run(["inspect", str(folder), "--json"])
        out, err = capfd.readouterr()
        assert code in ALLOWED | {0}, err
        assert "Traceback" not in err
        json.loads(out)

    try:
        any_content()
    finally:
        file.write_bytes(whole)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Name -> shape of every tensor in a single file of the original code."""
    file = write_ldm(tmp_path_factory.mktemp("single") / "model.safetensors", ldm_tensors(original_pipeline("sd1")))
    return {name: list(tensor.shape) for name, tensor in read_header(file).items()}


def test_single_files_with_any_tensors(shapes: dict[str, list[int]], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    given_parts = Companions(tokenizer=DEMO_FOLDER / "tokenizer")

    def look() -> None:
        parameters_of(open_checkpoint(file, companions=given_parts, survey=False))

    def write(content: dict[str, list[int]]) -> None:
        header, end = {}, 0
        for name, shape in content.items():
            start, end = end, end + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        raw_safetensors(file, header)
        os.truncate(file, file.stat().st_size + end)

    sizes = st.lists(st.sampled_from((0, 1, 2, 3, 4, 8, 32, 77, 320, 768, 4096)), max_size=5)
    names = st.sampled_from(sorted(shapes))

    @cases(60)
    @given(
        removed=st.sets(names, max_size=4),
        reshaped=st.dictionaries(names | st.text(max_size=9), sizes, max_size=4),
        prefix=st.sampled_from(("", "model.", "model.diffusion_model.", "first_stage_model.", "cond_stage_model.")),
    )
    def any_tensors(removed: set[str], reshaped: dict[str, list[int]], prefix: str) -> None:
        write({name: shape for name, shape in (shapes | reshaped).items() if name not in removed} | {prefix: [1]})
        answer(look, tmp_path)

    write(shapes)
    assert answer(look, tmp_path) is None
    any_tensors()
