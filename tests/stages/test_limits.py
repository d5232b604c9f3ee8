"""A child that hangs or takes all memory ends with an error that says so, and takes nothing else with it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from diffusette.runtimes.isolation import open_isolated
from diffusette.stages.artifacts import TargetModel, TensorSpec
from diffusette.stages.cache import Cache
from diffusette.stages.errors import DiffusetteError, NoRoom, ToolCrashed, UsageError
from diffusette.stages.limits import Patience, ran_out_of_memory
from diffusette.stages.progress import Silent
from diffusette.stages.run_stage import run_stage

HERE: Final = Path(__file__).parent
sys.path.append(str(HERE))

from obedient import Write  # noqa: E402


@pytest.fixture(autouse=True)
def children_find_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{HERE.parent / 'runtimes'}", prepend=os.pathsep)


def refusal(text: str, tmp_path: Path) -> DiffusetteError:
    cache = Cache(tmp_path / "cache")
    cache.prepare()
    with pytest.raises(DiffusetteError) as caught:
        run_stage(Write(text, tmp_path / "log"), cache, Silent())
    return caught.value


@pytest.mark.parametrize("text", ["slow", "busy for ever"])
def test_a_stage_that_hangs_is_stopped(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSETTE_CHILD_SECONDS", "4")
    started = time.monotonic()
    error = refusal(text, tmp_path)
    assert isinstance(error, ToolCrashed)
    assert time.monotonic() - started < 30
    assert "Write was stopped" in error.what
    assert "DIFFUSETTE_CHILD_SECONDS" in error.hint


def test_a_model_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_isolated("unruly:open_doubler", {"how": "hang"}, threads=1, name="doubler") as session:
        monkeypatch.setenv("DIFFUSETTE_CHILD_SECONDS", "2")
        with pytest.raises(ToolCrashed, match="doubler was stopped: it"):
            session.run({"x": np.zeros((2, 3), np.float32)})


@pytest.mark.parametrize("text", ["greedy", "greedy native code"])
def test_a_stage_that_takes_all_memory_is_refused_it(text: str, tmp_path: Path) -> None:
    error = refusal(text, tmp_path)
    assert isinstance(error, NoRoom)
    assert "memory" in error.what
    assert "DIFFUSETTE_CHILD_MIB" in error.hint


def test_a_small_graph_cannot_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lines of ncnn's graph make 17 GB of a kilobyte; our own checks cannot know what every layer does."""
    pytest.importorskip("ncnn")
    monkeypatch.setenv("DIFFUSETTE_CHILD_MIB", "700")
    lines = ["7767517", "2 2", "Input in0 0 1 in0 0=8 1=8 2=4", "Interp up 1 1 in0 out0 0=1 1=4096.0 2=4096.0"]
    (tmp_path / "x.param").write_text("\n".join([*lines, ""]))
    (tmp_path / "x.bin").write_bytes(b"")
    given, made = TensorSpec("in0", "float32", (1, 4, 8, 8)), TensorSpec("out0", "float32", (1, 4, 32768, 32768))
    model = TargetModel(tmp_path, "unet", "ncnn", "fp32", ("x.param", "x.bin"), (given,), (made,), 32.0)
    with (
        open_isolated("diffusette.runtimes.registry:open_model", model, threads=1) as session,
        pytest.raises((NoRoom, ToolCrashed)),
    ):
        session.run({"in0": np.zeros((1, 4, 8, 8), np.float32)})


@pytest.mark.parametrize("name", ["DIFFUSETTE_CHILD_SECONDS", "DIFFUSETTE_CHILD_MIB"])
@pytest.mark.parametrize("text", ["soon", "0", "-1", "1.5"])
def test_a_limit_that_is_no_number_is_a_mistake(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    error = refusal("a stage", tmp_path)
    assert isinstance(error, UsageError)
    assert text in error.what


def test_what_native_code_says_without_memory_is_understood() -> None:
    for words in (
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes",
        "OSError: [Errno 12] Cannot allocate memory",
    ):
        assert ran_out_of_memory(words)
    assert not ran_out_of_memory("unknown operator Foo")


def test_only_a_child_that_works_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, used = [0.0], [0.0]
    monkeypatch.setattr("diffusette.stages.limits.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("diffusette.stages.limits._processor_seconds", lambda _: used[0])
    patience = Patience(1)
    for _ in range(1000):
        clock[0], used[0] = clock[0] + 6, used[0] + 0.01  # a starved machine
        assert patience.ended() == ""
    clock[0] += 599
    assert patience.ended() == ""
    clock[0] += 6
    assert patience.ended() == "it has done nothing for 605 s"
    clock[0], used[0] = 6 * 3600 + 1, used[0] + 1
    assert patience.ended() == "it was not done after 21600 s"
