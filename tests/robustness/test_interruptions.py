"""Killed at any moment, a conversion goes on where it was; nothing half-written is ever at the output.

`DIFFUSETTE_KILLS=30` makes it thirty random moments (docs/robustness.md); `DIFFUSETTE_SEED` repeats a run's choices.
"""

from __future__ import annotations

import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil
import pytest
from diffusette.bundle.bundle import open_bundle

from .conftest import command, environment, listen_to_ctrl_c, tree

pytestmark = pytest.mark.slow

KILLS: Final = int(os.environ.get("DIFFUSETTE_KILLS", "4"))
TARGETS: Final = ("ort", "ncnn", "mnn")
TOOLS: Final = {"pnnx": "pnnx/pnnx ", "mnnconvert": "diffusette.runtimes.mnn.native"}  # words of their command lines
SEED: Final = int(os.environ.get("DIFFUSETTE_SEED", random.randrange(2**32)))


class Conversion:
    """A running conversion, and the stages that it says it has finished."""

    def __init__(self, checkpoint: Path, output: Path, cache: Path, *targets: str) -> None:
        self._process = subprocess.Popen(
            command(checkpoint, output, *targets),
            env=environment(cache, {"OMP_NUM_THREADS": "1"}),
            text=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            preexec_fn=listen_to_ctrl_c,
        )
        self.pid = self._process.pid
        self.said: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self.said.append(line)
            self._lines.put(line)

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    @property
    def finished(self) -> list[str]:
        return [line[2:38].strip() for line in self.said if line.startswith("+ ")]

    def wait_for_stage(self, seconds: float) -> None:
        """Until it has finished another stage; at most `seconds`."""
        until = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < until:
            try:
                if self._lines.get(timeout=0.2).startswith("+ "):
                    return
            except queue.Empty:
                continue

    def wait_for_child(self, words: str) -> psutil.Process | None:
        """Until it, or a child of it, runs a program with `words` in its command line; None if that never comes."""
        while self.lives:
            for child in self.children():
                with suppress(psutil.Error):
                    if words in " ".join(child.cmdline()):
                        return child
            time.sleep(0.02)
        return None

    def children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        status = self._process.wait()
        self._reader.join(30)
        return status


def test_killed_at_random_moments_it_ends_in_the_same_bytes_and_repeats_no_stage(
    tiny_folder: Path, straight: Path, tmp_path: Path
) -> None:
    sys.stderr.write(f"DIFFUSETTE_SEED={SEED} DIFFUSETTE_KILLS={KILLS}\n")
    chance = random.Random(SEED)
    round_number, victims = 0, []
    aims = list(TOOLS)  # the native converters in the order in which they come, and random moments in between
    for _ in range(KILLS - len(TOOLS)):
        aims.insert(chance.randint(0, len(aims)), "")
    while aims or round_number == 0:  # as many conversions as it takes
        round_number += 1
        assert round_number <= 2 * KILLS, f"{aims[0]} is not to be met: are its words still in its command line?"
        output, cache = tmp_path / f"out-{round_number}", tmp_path / f"cache-{round_number}"
        finished: list[str] = []
        while True:
            conversion = Conversion(tiny_folder, output, cache)
            while aims and conversion.lives:  # it survives the death of a warm process that nobody needed
                if victim := kill_somebody(conversion, aims[0], chance):
                    victims.append(victim)
                    aims.pop(0)
            status = conversion.end()
            said = "".join(conversion.said)
            finished += conversion.finished
            assert "Traceback" not in said, said
            if status == 0:
                break
            assert status in (-signal.SIGKILL, 4), said  # it was killed itself, or tells that its child was
            # the kill may also come between the bundle's rename and the end of the process: then it is whole
            for bundle in (output / target for target in TARGETS):
                assert not bundle.exists() or open_bundle(bundle).verify().ok
        assert len(finished) == len(set(finished)), finished  # each kill cost at most the stage that it hit
        assert [path.name for path in (cache / "work").iterdir()] == []
        for target in TARGETS:
            assert tree(output / target) == tree(straight / target), victims
        shutil.rmtree(cache)
    assert len(victims) == KILLS
    assert set(TOOLS) <= set(victims)


def kill_somebody(conversion: Conversion, aim: str, chance: random.Random) -> str:
    """SIGKILL for the tool `aim`; without one, at a random moment for the conversion or for one of its children: the
    warm process, a stage, a tool that a stage runs. Returns who it was; nothing if the conversion ended before."""
    if aim:
        tool = conversion.wait_for_child(TOOLS[aim])
        with suppress(psutil.NoSuchProcess):
            if tool:
                tool.kill()
                return aim
        return ""
    conversion.wait_for_stage(seconds=600)
    time.sleep(chance.uniform(0, 4))
    if not conversion.lives:
        return ""
    children = conversion.children()
    if not children or chance.random() < 0.5:
        conversion.signal(signal.SIGKILL)
        return "the conversion"
    victim = chance.choice(children)
    try:
        words = " ".join(victim.cmdline()[1:4])
        victim.kill()
    except psutil.NoSuchProcess:  # it ended in this very moment
        return "nobody"
    return words


def test_ctrl_c_stops_at_once_keeps_finished_stages_and_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    conversion = Conversion(tiny_folder, tmp_path / "out", tmp_path / "cache", "--target", "ort")
    conversion.wait_for_stage(seconds=600)
    time.sleep(0.5)
    conversion.signal(signal.SIGINT)
    stopped = time.monotonic()
    assert conversion.end() == 130
    assert time.monotonic() - stopped < 10
    said = "".join(conversion.said)
    assert "finished stages are kept" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small tmpfs")
def test_a_full_disk_is_told_and_with_more_room_two_at_once_go_on_and_share_the_work(
    tiny_folder: Path, straight: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    words = command(tiny_folder, tmp_path / "out", "--target", "ort")
    usual = environment(small / "cache", {"OMP_NUM_THREADS": "1"})
    try:
        refused = subprocess.run(words, env=usual, capture_output=True, text=True)
        assert refused.returncode == 4
        assert "are free" in refused.stderr
        forced = subprocess.run([*words, "--ignore-forecast"], env=usual, capture_output=True, text=True)
        assert forced.returncode == 4, forced.stderr
        assert "full" in forced.stderr or "free" in forced.stderr
        assert "Traceback" not in forced.stderr
        assert not (tmp_path / "out").exists()
        kept = [line for line in forced.stderr.splitlines() if line.startswith("+ ")]

        subprocess.run(["mount", "-o", "remount,size=64M", str(small)], check=True)
        both = [
            Conversion(tiny_folder, tmp_path / name, small / "cache", "--target", "ort") for name in ("out", "other")
        ]
        assert [each.end() for each in both] == [0, 0], [each.said for each in both]
        for each in both:
            reused = [line for line in each.said if line.startswith("= ")]
            assert len(reused) >= len(kept) > 0
        done = both[0].finished + both[1].finished
        assert len(done) == len(set(done))  # each stage was run by one of the two
        for name in ("out", "other"):
            assert tree(tmp_path / name) == tree(straight / "ort")
    finally:
        subprocess.run(["umount", str(small)], check=True)
