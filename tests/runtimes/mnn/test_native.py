"""MNN's converter in its child process: private, alone, offline, and not believed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from diffusette.runtimes.mnn import convert
from diffusette.runtimes.mnn.convert import BuildMnn
from diffusette.runtimes.mnn.native import mnnconvert
from diffusette.runtimes.mnn.session import MnnSession
from diffusette.stages.artifacts import OnnxModel, TargetModel, TensorSpec
from diffusette.stages.errors import ModelError, ToolCrashed
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

WIDTH: Final = 512  # a matrix of 256 Ki elements: above 64 Ki the converter spills it to its working directory
SPEC: Final = (TensorSpec("x", "float32", (1, WIDTH)),), (TensorSpec("y", "float32", (1, WIDTH)),)
PROGRAMS: Final = ("pip", "pip3", "python", "python3", "sh", "bash", "curl", "wget")


def matrix(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)).astype(np.float32)


def save(file: Path, nodes: Sequence[Any], constants: Sequence[Any]) -> Path:
    x, y = (helper.make_tensor_value_info(spec[0].name, TensorProto.FLOAT, spec[0].shape) for spec in SPEC)
    graph = helper.make_graph(list(nodes), "g", [x], [y], list(constants))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("elsewhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), file)
    return file


def linear(folder: Path, seed: int) -> OnnxModel:
    """y = x W"""
    folder.mkdir(parents=True, exist_ok=True)
    save(
        folder / "model.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [numpy_helper.from_array(matrix(seed), "w")],
    )
    return OnnxModel(folder, "vae_decoder", "fp32", *SPEC)


def build(folder: Path, seed: int) -> TargetModel:
    into = folder / "mnn"
    into.mkdir(parents=True)
    return BuildMnn(linear(folder / "onnx", seed)).run(into)


def weights_of(model: TargetModel) -> NDArray[Any]:
    """W, a few rows of it: what the model answers to unit vectors."""
    with MnnSession(model, threads=1) as session:
        return np.concatenate([session.run({"x": np.eye(WIDTH, dtype=np.float32)[i : i + 1]})["y"] for i in range(4)])


def arguments(model: Path, result: Path) -> list[str]:
    return ["-f", "ONNX", "--modelFile", str(model), "--MNNModel", str(result), "--bizCode", "test"]


def test_conversions_at_the_same_time_do_not_touch_each_others_weights(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda seed: build(tmp_path / str(seed), seed), range(4)))
    for seed, model in enumerate(models):
        assert np.allclose(weights_of(model), matrix(seed)[:4], atol=1e-5)


def test_a_working_directory_is_never_shared(tmp_path: Path) -> None:
    model = linear(tmp_path / "onnx", 0)
    mnnconvert(arguments(model.file, tmp_path / "a.mnn"), tmp_path)
    with pytest.raises(FileExistsError):
        mnnconvert(arguments(model.file, tmp_path / "b.mnn"), tmp_path)


def test_a_build_leaves_the_model_and_nothing_else(tmp_path: Path) -> None:
    model = build(tmp_path, 0)
    assert [file.name for file in model.folder.iterdir()] == ["vae_decoder.mnn"] == list(model.files)


def test_no_program_is_started(tmp_path: Path) -> None:
    programs, mark = tmp_path / "bin", tmp_path / "mark"
    programs.mkdir()
    for name in PROGRAMS:
        program = programs / name
        program.write_text(f"#!/bin/sh\necho {name} >> {mark}\n")
        program.chmod(0o755)
    model = linear(tmp_path / "onnx", 0)
    mnnconvert(arguments(model.file, tmp_path / "a.mnn"), tmp_path, search_path=str(programs))
    assert (tmp_path / "a.mnn").is_file()
    assert not mark.exists()
    subprocess.run("pip", env={"PATH": str(programs)}, check=True)  # the trap itself works
    assert mark.read_text() == "pip\n"


@pytest.mark.parametrize(
    "attempt",
    [
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.fork()",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import MNN.tools.mnnconvert",
    ],
)
def test_the_converters_process_refuses_programs_sockets_and_the_console_tools(attempt: str) -> None:
    code = f"import sys; from diffusette.runtimes.mnn import native; sys.addaudithook(native._refuse)\n{attempt}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 86, done.stderr


def test_an_attempt_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impostor = tmp_path / "impostor"
    impostor.mkdir()
    (impostor / "_tools.py").write_text("import os\ndef mnnconvert(_): return os.system('pip install x') == 0\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(impostor), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(ToolCrashed, match=r"os\.system .*pip install x"):
        mnnconvert([], tmp_path)


def test_an_operator_that_mnn_lacks_is_named(tmp_path: Path) -> None:
    model = save(tmp_path / "foo.onnx", [helper.make_node("Foo", ["x"], ["y"], domain="elsewhere")], [])
    with pytest.raises(ToolCrashed, match=r"Not Support: .*Foo"):
        mnnconvert(arguments(model, tmp_path / "foo.mnn"), tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model" * 99])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(ToolCrashed, match="did not convert"):
        mnnconvert(arguments(tmp_path / "x.onnx", tmp_path / "x.mnn"), tmp_path)


def test_a_crash_is_told_with_its_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_tools.py").write_text("import os\ndef mnnconvert(arguments): os.kill(os.getpid(), 11)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(ToolCrashed, match="SIGSEGV"):
        mnnconvert([], tmp_path)


def test_a_claimed_success_without_a_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter says "Converted Success!" after writing to a folder that does not exist."""
    monkeypatch.setattr(convert, "mnnconvert", lambda *_: "Converted Success!")
    with pytest.raises(ModelError, match=r"vae_decoder\.mnn"):
        build(tmp_path, 0)


def test_large_weights_go_to_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inline = weights_of(build(tmp_path / "inline", 0))
    monkeypatch.setattr(convert, "EXTERNAL_ABOVE", 0)
    model = build(tmp_path / "external", 0)
    assert model.files == ("vae_decoder.mnn", "vae_decoder.mnn.weight")
    assert (model.folder / model.files[1]).stat().st_size >= WIDTH * WIDTH * 4
    assert np.array_equal(weights_of(model), inline)


@pytest.mark.parametrize("kept", [0, 1, 0.5, 0.999])
def test_a_truncated_weight_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: float) -> None:
    monkeypatch.setattr(convert, "EXTERNAL_ABOVE", 0)
    model = build(tmp_path, 0)
    weights = model.folder / model.files[1]
    os.truncate(weights, int(weights.stat().st_size * kept) - (kept == 1))
    with pytest.raises(ModelError, match="bytes and its model reads"):
        MnnSession(model, threads=1)


def test_a_missing_weight_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "EXTERNAL_ABOVE", 0)
    model = build(tmp_path, 0)
    (model.folder / model.files[1]).unlink()
    with pytest.raises(ModelError, match="has 0 bytes"):
        MnnSession(model, threads=1)


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.99])
def test_a_truncated_model_is_an_error(tmp_path: Path, kept: float) -> None:
    model = build(tmp_path, 0)
    file = model.folder / model.files[0]
    os.truncate(file, int(kept * file.stat().st_size) if 0 < kept < 1 else int(kept))
    with pytest.raises(ModelError):
        MnnSession(model, threads=1)


def test_weights_that_became_garbage_are_noticed_in_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MNN has no NaN to show for them: broken weights give finite numbers of 1e38."""
    monkeypatch.setattr(convert, "EXTERNAL_ABOVE", 0)
    model = build(tmp_path, 0)
    weights = model.folder / model.files[1]
    weights.write_bytes(b"\x7f\x7f" * (weights.stat().st_size // 2))
    with MnnSession(model, threads=1) as session, pytest.raises(ToolCrashed, match="reaches"):
        session.run({"x": np.ones((1, WIDTH), np.float32)})


@pytest.mark.parametrize("honest", [True, False], ids=["a layer of zeros", "lost weights"])
def test_weights_that_the_converter_lost_are_told_from_zeros_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, honest: bool
) -> None:
    """Seen on a disk that was full at some moment: zeros from there on, and "Converted Success!"."""

    def lossy(flags: list[str], scratch: Path) -> str:
        said = mnnconvert(flags, scratch)
        file = Path(f"{flags[flags.index('--MNNModel') + 1]}.weight")
        file.write_bytes(bytes(file.stat().st_size))
        return said

    monkeypatch.setattr(convert, "EXTERNAL_ABOVE", 0)
    monkeypatch.setattr(convert, "mnnconvert", lossy)
    monkeypatch.setattr(convert, "_zero_weights", lambda _: int(honest))
    if honest:
        assert build(tmp_path, 0).files
    else:
        with pytest.raises(ToolCrashed, match="wrote zeros for the weights of 1 layers"):
            build(tmp_path, 0)
