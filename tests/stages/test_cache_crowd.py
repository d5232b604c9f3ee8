"""One cache under many real processes: each stage once, nothing lost, nothing half-made, whoever is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest
from diffusette.stages.cache import Cache

HERE: Final = Path(__file__).parent
WORDS: Final = 4  # stages that each process of the crowd wants


def start(what: str, cache: Path, logs: Path, seconds: float = 0) -> subprocess.Popen[str]:
    argv = [sys.executable, "-P", str(HERE / "crowd.py"), what, str(cache), str(logs), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        argv, env=environment, text=True, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, start_new_session=True
    )


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


def assert_whole(root: Path) -> None:
    cache = Cache(root)
    cache.prepare()  # sweeps up after the dead
    assert list(cache.damaged()) == []
    assert [path.name for path in (root / "work").iterdir()] == []
    assert [path.name for path in (root / "objects").glob("*/.*")] == []


def test_four_at_once_run_each_stage_once(tmp_path: Path, logs: Path) -> None:
    crowd = [start("convert", tmp_path / "cache", logs) for _ in range(4)]
    assert [(process.communicate(timeout=120)[0], process.returncode) for process in crowd] == [("", 0)] * 4
    assert [log.read_text() for log in logs.iterdir()] == ["x"] * WORDS
    assert_whole(tmp_path / "cache")
    assert len(Cache(tmp_path / "cache").entries()) == WORDS


def test_who_prunes_or_lists_meanwhile_breaks_nothing(tmp_path: Path, logs: Path) -> None:
    cache = tmp_path / "cache"
    crowd = [start("convert", cache, logs, 4), start("convert", cache, logs, 4), start("prune", cache, logs, 5)]
    crowd.append(start("list", cache, logs, 5))
    assert [(process.communicate(timeout=120)[0], process.returncode) for process in crowd] == [("", 0)] * 4
    assert_whole(cache)


def test_who_is_killed_is_replaced_by_the_next_in_line(tmp_path: Path, logs: Path) -> None:
    crowd = [start("convert", tmp_path / "cache", logs) for _ in range(3)]
    time.sleep(random.uniform(0.5, 3))
    crowd[0].send_signal(signal.SIGKILL)
    crowd[0].communicate()
    assert [(process.communicate(timeout=120)[0], process.returncode) for process in crowd[1:]] == [("", 0)] * 2
    assert all(len(log.read_text()) <= 2 for log in logs.iterdir())  # it cost at most the stage it was in
    assert_whole(tmp_path / "cache")
