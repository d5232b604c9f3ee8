"""Copies of files, and disks that are or become full."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusette.stages.disk import copy_file, require_room
from diffusette.stages.errors import ModelError, NoRoom
from diffusette.stages.publish import published, written


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_copy_shares_no_bytes_with_its_source(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(os.urandom(100_000))
    source.chmod(0o444)
    copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_nlink == 1
    before = source.read_bytes()
    with target.open("r+b") as stream:
        stream.write(b"edited by an app developer")
    assert source.read_bytes() == before
    assert os.stat(target).st_mode & 0o200  # noqa: PTH116 - the bits of the copy, not those of the source


@pytest.mark.parametrize("size", [0, 1, 100_000])
@pytest.mark.parametrize("refusal", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_copy_works_where_the_kernel_cannot_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int, size: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    (tmp_path / "a").write_bytes(os.urandom(size))
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone: cannot be read: No such file"):
        copy_file(tmp_path / "gone", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(NoRoom, match=r"out: the disk is full: [\d,]+\.0 MiB needed, [\d,.]+ MiB free") as caught:
        require_room(tmp_path / "not" / "yet" / "out", 2**60)
    assert caught.value.hint
    with pytest.raises(NoRoom), published(tmp_path / "out", needed=2**60):
        pytest.fail("the block must not start")
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_disk_that_fills_up_is_said_so_and_left_clean(small_disk: Path, tmp_path: Path) -> None:
    filled = r"out: the disk is full: it filled while writing, 0\.0 MiB free"
    with pytest.raises(NoRoom, match=filled), published(small_disk / "out") as scratch:
        (scratch / "a").write_bytes(bytes(2 * 2**20))
    (tmp_path / "big").write_bytes(bytes(2 * 2**20))
    with pytest.raises(NoRoom, match=r"copy: the disk is full: 2\.0 MiB needed"):
        copy_file(tmp_path / "big", small_disk / "copy")
    assert names(small_disk) == []


def test_a_full_disk_is_understood_through_a_librarys_own_error(tmp_path: Path) -> None:
    class SafetensorError(Exception):
        pass

    with pytest.raises(NoRoom, match="out: the disk is full"), published(tmp_path / "out"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(NoRoom, match="file: the disk is full"), written(tmp_path / "file"):
        raise RuntimeError("could not save") from OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []
