"""Killed in any stage, a conversion goes on where it was; nothing half-written is ever at the output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from diffusette.pipeline.bundle import open_bundle

pytestmark = pytest.mark.slow


def start(checkpoint: Path, output: Path, cache: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "diffusette", "convert", str(checkpoint), "-o", str(output), "--target", "ort"]
    environment = {**os.environ, "DIFFUSETTE_CACHE": str(cache)}
    return subprocess.Popen(
        argv,
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        preexec_fn=listen_to_ctrl_c,
    )


def listen_to_ctrl_c() -> None:
    """A test run that was started in the background inherits an ignored SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def tree(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_killed_in_every_stage_it_resumes_and_ends_in_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    output, cache = tmp_path / "out", tmp_path / "cache"
    finished: list[str] = []
    for _ in range(100):
        process = start(tiny_folder, output, cache)
        assert process.stderr
        for line in process.stderr:
            if line.startswith("+"):  # a stage was finished: kill within the next one
                finished.append(line.split("  ")[0])
                time.sleep(0.15)
                process.send_signal(signal.SIGKILL)
                break
        rest = process.stderr.read()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, rest
        # The kill may also come between the bundle's rename and the end of the process: then it is whole.
        assert not output.exists() or open_bundle(output).verify().ok
    else:
        pytest.fail(f"never ended; finished {finished}")
    assert len(finished) == len(set(finished)) > 15  # each kill cost at most the stage that it hit
    left = [path.name for path in (cache / "work").iterdir()]
    assert left == []
    straight = start(tiny_folder, tmp_path / "straight", cache)
    assert straight.wait() == 0
    assert tree(output) == tree(tmp_path / "straight")
    assert open_bundle(output).verify().ok


def test_ctrl_c_stops_at_once_keeps_finished_stages_and_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    process = start(tiny_folder, tmp_path / "out", tmp_path / "cache")
    assert process.stderr
    for line in process.stderr:
        if line.startswith("+"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    stopped = time.monotonic()
    rest = process.stderr.read()
    assert process.wait() == 130
    assert time.monotonic() - stopped < 10
    assert "finished stages are kept" in rest
    assert "Traceback" not in rest
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small tmpfs")
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    argv = [sys.executable, "-m", "diffusette", "convert", "demo", "-o", str(tmp_path / "out"), "--target", "ort"]
    environment = {**os.environ, "DIFFUSETTE_CACHE": str(small / "cache")}
    try:
        refused = subprocess.run(argv, env=environment, capture_output=True, text=True)
        assert refused.returncode == 4
        assert "are free" in refused.stderr
        forced = subprocess.run([*argv, "--ignore-forecast"], env=environment, capture_output=True, text=True)
        assert forced.returncode == 4, forced.stderr
        assert "full" in forced.stderr or "free" in forced.stderr
        assert "Traceback" not in forced.stderr
        assert not (tmp_path / "out").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)
