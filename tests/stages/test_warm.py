"""Stages that need torch are forked from a process that has it imported, and are as separate as fresh ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import psutil
import pytest
from diffusette.stages.cache import Cache
from diffusette.stages.errors import ModelError, NoRoom, ToolCrashed
from diffusette.stages.progress import Silent
from diffusette.stages.run_stage import run_stage
from diffusette.stages.warm import warm_pid, warm_process

HERE: Final = str(Path(__file__).parent)
sys.path.append(HERE)

from obedient import Imitate  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks after such imports")


@pytest.fixture(autouse=True)
def children_find_obedient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", HERE, prepend=os.pathsep)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    made = Cache(tmp_path / "cache")
    made.prepare()
    return made


def test_a_stage_is_forked_from_the_server_with_torch_imported_and_its_own_environment(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFUSETTE_TEST_WORD", "first")
    first = run_stage(Imitate("facts", 1), cache, Silent())
    monkeypatch.setenv("DIFFUSETTE_TEST_WORD", "second")
    second = run_stage(Imitate("facts", 2), cache, Silent())
    assert first.parent == second.parent == warm_pid()
    assert first.pid != second.pid
    assert first.torch
    assert (first.word, second.word) == ("first", "second")
    assert first.temporary == first.cwd  # private, in the stage's own folder
    assert first.cwd != second.cwd


def test_errors_crashes_and_kills_come_back_as_from_a_fresh_process(cache: Cache) -> None:
    with pytest.raises(ModelError, match="as told"):
        run_stage(Imitate("error", 0), cache, Silent())
    with pytest.raises(ToolCrashed, match=r"SIGABRT.*\n.*last words"):
        run_stage(Imitate("abort", 0), cache, Silent())
    with pytest.raises(NoRoom, match="signal 9"):
        run_stage(Imitate("kill", 0), cache, Silent())
    assert run_stage(Imitate("facts", 3), cache, Silent()).torch  # the server lived on


def test_a_server_that_died_is_replaced(cache: Cache) -> None:
    run_stage(Imitate("facts", 4), cache, Silent())
    died = warm_pid()
    assert died
    os.kill(died, signal.SIGKILL)
    after = run_stage(Imitate("facts", 5), cache, Silent())
    assert after.torch
    assert after.parent != died


def test_a_stage_that_takes_the_server_with_it_is_reported(cache: Cache) -> None:
    with pytest.raises(NoRoom, match="signal 9"):
        run_stage(Imitate("kill the server", 0), cache, Silent())
    server = warm_process()
    assert server
    assert server.usable


def test_server_and_stage_die_with_the_process_that_asked(cache: Cache, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from diffusette.stages.cache import Cache\n"
        "from diffusette.stages.progress import Silent; from diffusette.stages.run_stage import run_stage\n"
        "from obedient import Imitate\n"
        f"run_stage(Imitate('sleep', 0, {str(tmp_path / 'pid')!r}), Cache(Path({str(cache.root)!r})), Silent())"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    for _ in range(1200):
        if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text().count(" ") == 1:
            break
        time.sleep(0.1)
    pids = [int(pid) for pid in (tmp_path / "pid").read_text().split()]
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not any(_lives(pid) for pid in pids):
            break
        time.sleep(0.1)
    assert [pid for pid in pids if _lives(pid)] == []


def _lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
