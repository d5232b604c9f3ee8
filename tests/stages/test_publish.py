"""What is written appears whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from diffusette.stages import disk, publish
from diffusette.stages.errors import UsageError
from diffusette.stages.publish import Existing, published, sweep, written


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def fill(folder: Path, content: str, existing: Existing = "keep") -> None:
    with published(folder, existing=existing) as scratch:
        (scratch / "a").write_text(content)


def fail_after_writing(file: Path, error: BaseException) -> None:
    file.write_text("half")
    raise error


def test_a_folder_appears_when_the_block_is_done_and_not_before(tmp_path: Path) -> None:
    with published(tmp_path / "deep" / "out") as scratch:
        (scratch / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"
    assert names(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_nothing_and_its_error_passes(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), published(tmp_path / "out") as scratch:
        fail_after_writing(scratch / "a", error())
    assert names(tmp_path) == []


def test_an_oserror_of_the_block_about_another_file_passes_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"), published(tmp_path / "out"):
        (tmp_path / "nowhere").read_bytes()
    with pytest.raises(PermissionError), published(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "checkpoint" / "unet.safetensors"))


def test_the_first_of_two_publishers_wins_and_the_loser_leaves_nothing(tmp_path: Path) -> None:
    with published(tmp_path / "out") as scratch:
        fill(tmp_path / "out", "first")
        (scratch / "a").write_text("second")
    assert (tmp_path / "out" / "a").read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_an_existing_folder_is_refused_before_the_work_starts(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="out: exists already") as caught:
        fill(tmp_path / "out", "new", "refuse")
    assert "-o" in caught.value.hint
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_a_folder_that_appears_meanwhile_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"), published(tmp_path / "out", existing="refuse"):
        fill(tmp_path / "out", "other")
    assert (tmp_path / "out" / "a").read_text() == "other"
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_counts_as_absent(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "new", "refuse")
    assert (tmp_path / "out" / "a").read_text() == "new"


def test_replacing_leaves_the_new_folder_alone(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    (tmp_path / "out" / "b").write_text("of the old one")
    fill(tmp_path / "out", "new", "replace")
    assert names(tmp_path / "out") == ["a"]
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_replacement_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".scratch"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        fill(tmp_path / "out", "new", "replace")
    monkeypatch.undo()
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_link_to_a_folder_is_published_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    fill(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "elsewhere" / "a").read_text() == "new"


KILLED = """
    import os, sys, time
    from pathlib import Path
    from diffusette.stages import publish
    out = Path(sys.argv[1])
    rename = Path.rename
    def stop(self, target):
        if sys.argv[2] == "between" and self.name.endswith(".scratch"):
            wait()
        return rename(self, target)
    def wait():
        print("ready", flush=True)
        time.sleep(60)
    Path.rename = stop
    with publish.published(out, existing="replace") as scratch:
        (scratch / "a").write_text("half")
        if sys.argv[2] == "inside":
            wait()
"""


def kill_while_publishing(out: Path, when: str) -> None:
    argv = [sys.executable, "-c", textwrap.dedent(KILLED), str(out), when]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert sweep(out.parent) == ()  # what a living process writes is left alone
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def test_a_process_killed_while_writing_leaves_nothing_visible_and_the_sweep_cleans_up(tmp_path: Path) -> None:
    kill_while_publishing(tmp_path / "out", "inside")
    assert not (tmp_path / "out").exists()
    (left,) = names(tmp_path)
    assert left.startswith(".out.")
    assert sweep(tmp_path) == (left,)
    assert names(tmp_path) == []


def test_the_next_publication_sweeps_by_itself(tmp_path: Path) -> None:
    kill_while_publishing(tmp_path / "out", "inside")
    fill(tmp_path / "other", "1")
    assert names(tmp_path) == ["other"]


def test_a_process_killed_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    kill_while_publishing(tmp_path / "out", "between")
    assert not (tmp_path / "out").exists()  # the one moment
    assert len(sweep(tmp_path)) == 2
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_name_that_came_since_is_not_overwritten_by_what_was_moved_aside(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    kill_while_publishing(tmp_path / "out", "between")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("by hand")
    sweep(tmp_path)
    assert (tmp_path / "out" / "a").read_text() == "by hand"
    assert names(tmp_path) == ["out"]


def test_a_reused_process_id_does_not_protect_rubbish(tmp_path: Path) -> None:
    mine = publish._beside(tmp_path / "out", "scratch")
    mine.mkdir()
    machine, rest = mine.name.removeprefix(".out.").split("-", 1)
    pid, began, chance = rest.split("-")
    earlier = tmp_path / f".out.{machine}-{pid}-{int(began) - 3600}-{chance}"
    earlier.mkdir()
    assert sweep(tmp_path) == (earlier.name,)
    assert names(tmp_path) == [mine.name]


def test_another_machines_scratch_is_left_alone_for_a_week(tmp_path: Path) -> None:
    young, old = (tmp_path / f".out.00000000-1-1-{chance * 8}.scratch" for chance in "ab")
    for folder in (young, old):
        folder.mkdir()
    week_ago = old.stat().st_mtime - 8 * 24 * 3600
    os.utime(old, (week_ago, week_ago))
    assert sweep(tmp_path) == (old.name,)


def test_two_containers_with_one_host_name_leave_each_others_scratch_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_symlink", lambda self: self.name == "pid")  # also where there is no /proc
    monkeypatch.setattr(Path, "readlink", lambda _: Path("pid:[1]"))
    theirs = publish._beside(tmp_path / "out", "scratch").name
    nobody = theirs.replace(f"-{os.getpid()}-", "-4194305-")  # above the largest process id of Linux
    for namespace, swept in (("pid:[2]", ()), ("pid:[1]", (nobody,))):
        (tmp_path / nobody).mkdir(exist_ok=True)
        monkeypatch.setattr(Path, "readlink", lambda _, namespace=namespace: Path(namespace))
        assert sweep(tmp_path) == swept


def test_the_sweep_knows_its_own_names_only(tmp_path: Path) -> None:
    for name in (".hidden", "out", ".out.scratch", ".out.123.scratch"):
        (tmp_path / name).mkdir()
    assert sweep(tmp_path) == ()


def test_a_file_is_replaced_when_the_block_is_done_and_not_before(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file"
    for content in ("old", "new"):
        with written(file) as scratch:
            scratch.write_text(content)
    with pytest.raises(ZeroDivisionError), written(file) as scratch:
        fail_after_writing(scratch, ZeroDivisionError())
    assert file.read_text() == "new"
    assert names(file.parent) == ["file"]


def test_a_folder_below_a_file_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"out: cannot be written|out \(at .*file\): cannot be written") as caught:
        fill(tmp_path / "file" / "out", "1")
    assert "another place" in caught.value.hint
    with pytest.raises(UsageError, match="file: exists already"):
        fill(tmp_path / "file", "1", "refuse")
    with pytest.raises(UsageError, match="file: cannot be written: Not a directory"):
        fill(tmp_path / "file", "1")


def test_a_place_that_may_not_be_written_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match=r"out \(at .*\): cannot be written: Permission denied") as caught:
        fill(tmp_path / "out", "1")
    assert "right to write" in caught.value.hint


def test_an_error_that_is_no_refusal_of_the_disk_passes_unchanged(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="odd") as caught, disk.explained(tmp_path / "out"):
        raise OSError(errno.EIO, "odd", str(tmp_path / "out"))
    assert not isinstance(caught.value, UsageError)
