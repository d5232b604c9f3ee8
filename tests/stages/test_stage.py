"""run_stage: cached by key, isolated in a child, and nothing half-made stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest
from diffusette.stages.cache import Cache
from diffusette.stages.child import ChildBug
from diffusette.stages.errors import ModelError, NoRoom, ToolCrashed
from diffusette.stages.progress import Silent
from diffusette.stages.run_stage import run_stage
from diffusette.stages.stage import digest_of

HERE: Final = str(Path(__file__).parent)
sys.path.append(HERE)

from obedient import Write  # noqa: E402


@pytest.fixture(autouse=True)
def children_find_obedient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", HERE, prepend=os.pathsep)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    made = Cache(tmp_path / "cache")
    made.prepare()
    return made


def leftovers(cache: Cache) -> list[Path]:
    objects = list((cache.root / "objects").glob("*/*"))
    return [path for path in [*objects, *(cache.root / "work").iterdir()] if path.name.startswith(".")]


def test_a_stage_runs_once_and_is_then_read_from_the_cache(cache: Cache, tmp_path: Path) -> None:
    stage = Write("two words", tmp_path / "log")
    first = run_stage(stage, cache, Silent())
    second = run_stage(stage, cache, Silent())
    assert first == second
    assert first.words == 2
    assert (first.folder / "text.txt").read_text() == "two words"
    assert first.digest == first.folder.name == digest_of(stage)
    assert (tmp_path / "log").read_text() == "x"


def test_another_key_is_another_object(cache: Cache, tmp_path: Path) -> None:
    one = run_stage(Write("one", tmp_path / "log"), cache, Silent())
    two = run_stage(Write("two", tmp_path / "log"), cache, Silent())
    assert one.digest != two.digest


def test_a_damaged_object_is_noticed_and_built_again(cache: Cache, tmp_path: Path) -> None:
    stage = Write("one", tmp_path / "log")
    made = run_stage(stage, cache, Silent())
    (made.folder / "text.txt").write_text("on")
    again = run_stage(stage, cache, Silent())
    assert (again.folder / "text.txt").read_text() == "one"
    assert (tmp_path / "log").read_text() == "xx"


def test_cache_verify_finds_a_byte_that_changed_without_changing_the_size(cache: Cache, tmp_path: Path) -> None:
    made = run_stage(Write("one", tmp_path / "log"), cache, Silent())
    assert list(cache.damaged()) == []
    (made.folder / "text.txt").write_text("One")
    ((entry, problem),) = cache.damaged()
    assert entry.digest == made.digest
    assert problem == "text.txt has changed"


def test_prune_removes_the_longest_unused_first(cache: Cache, tmp_path: Path) -> None:
    old = run_stage(Write("old", tmp_path / "log"), cache, Silent())
    new = run_stage(Write("new", tmp_path / "log"), cache, Silent())
    os.utime(old.folder / "artifact.json", (1, 1))
    sizes = {entry.digest: entry.bytes for entry in cache.entries()}
    gone = cache.prune(sizes[new.digest])
    assert [entry.digest for entry in gone] == [old.digest]
    assert not old.folder.exists()
    assert new.folder.exists()


def test_an_error_of_the_stage_arrives_as_it_was_raised(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the model is wrong") as caught:
        run_stage(Write("raise", tmp_path / "log"), cache, Silent())
    assert caught.value.hint == "take another"
    assert leftovers(cache) == []


def test_an_error_of_another_package_arrives_as_what_it_derives_from(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="an odd model") as caught:
        run_stage(Write("odd", tmp_path / "log"), cache, Silent())
    assert caught.value.hint == "take an even one"


def test_a_file_that_went_is_named_and_one_of_our_own_is_a_bug(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.safetensors cannot be used: No such file"):
        run_stage(Write("absent", tmp_path / "log"), cache, Silent())
    with pytest.raises(ChildBug, match="FileNotFoundError"):
        run_stage(Write("our own absent", tmp_path / "log"), cache, Silent())


def test_an_unexpected_exception_is_a_bug_with_its_traceback(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ChildBug, match="ZeroDivisionError: ours"):
        run_stage(Write("bug", tmp_path / "log"), cache, Silent())


def test_a_crash_names_the_signal_and_shows_the_last_lines(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ToolCrashed, match=r"(?s)Write crashed with SIGSEGV.*last words"):
        run_stage(Write("segfault", tmp_path / "log"), cache, Silent())
    assert leftovers(cache) == []


def test_a_kill_is_told_as_probably_out_of_memory(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(NoRoom, match="killed"):
        run_stage(Write("killed", tmp_path / "log"), cache, Silent())


def test_a_full_disk_is_told_as_such(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(NoRoom, match="disk is full"):
        run_stage(Write("full", tmp_path / "log"), cache, Silent())
    assert leftovers(cache) == []


def test_peak_memory_of_the_child_is_measured(cache: Cache, tmp_path: Path) -> None:
    progress = Silent()
    run_stage(Write("big", tmp_path / "log"), cache, progress)
    (stage,) = progress.stages
    assert stage["tree_peak_mib"] > 200
    assert progress.peak_mib == pytest.approx(stage["tree_peak_mib"], abs=1)


KILLED = """
from pathlib import Path
from diffusette.stages.cache import Cache
from diffusette.stages.progress import Silent
from diffusette.stages.run_stage import run_stage
from obedient import Write
run_stage(Write("slow", Path({log!r})), Cache(Path({root!r})), Silent())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_parent_takes_its_child_along_and_leaves_nothing_that_counts(
    cache: Cache, tmp_path: Path, how: signal.Signals
) -> None:
    log = tmp_path / "log"
    script = KILLED.format(log=str(log), root=str(cache.root))
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=subprocess.DEVNULL,
        # a test run that was started in the background inherits an ignored SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    import psutil

    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.send_signal(how)
    parent.wait(30)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    cache.prepare()  # what the next conversion does first
    assert leftovers(cache) == []
    assert cache.entries() == []
