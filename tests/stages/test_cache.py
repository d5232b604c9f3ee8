"""The cache keeps what a conversion needs, and survives what users and other programs do to its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest
from diffusette.cli import run
from diffusette.stages.cache import Cache
from diffusette.stages.cache_object import CacheEntry, describe_file
from diffusette.stages.errors import ModelError, UsageError
from diffusette.stages.hashing import sha256_of_json


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("DIFFUSETTE_CACHE", str(tmp_path / "cache"))
    return Cache.default()


def put(cache: Cache, text: str) -> Path:
    """An object with one file, as run_stage would leave it."""
    folder = cache.folder(sha256_of_json(text))
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text(text)
    facts = describe_file(folder / "text.txt")
    record = {"stage": "write", "label": text, "facts": {}, "files": {"text.txt": facts}, "measured": {}}
    (folder / "artifact.json").write_text(json.dumps(record))
    return folder


def rot(file: Path) -> None:
    """Change a byte as a failing disk does: without a trace."""
    times = file.stat()
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@contextmanager
def as_nobody(root: Path) -> Iterator[None]:
    """Run the block without the right to enter `root`."""
    root.chmod(0)
    me = os.geteuid()
    try:
        if me == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(me)
        root.chmod(0o700)


def test_nothing_is_pruned_while_a_conversion_uses_the_cache(cache: Cache) -> None:
    folder = put(cache, "needed")
    rot(folder / "text.txt")
    with cache.used(), cache.used():  # two conversions at once are no matter
        with pytest.raises(UsageError, match="a conversion is using the cache") as caught:
            cache.prune(0)
        assert "try again" in caught.value.hint
        assert run(["cache", "prune"]) == run(["cache", "verify"]) == 2
        assert run(["cache", "ls"]) == 0
        assert folder.exists()
    assert len(cache.prune(0)) == 1
    assert not folder.exists()


def test_two_prunes_at_once_wait_for_each_other(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [put(cache, f"object {number}") for number in range(5)]
    in_the_middle, go_on = Event(), Event()
    remove = Cache.remove

    def slowly(self: Cache, entry: CacheEntry) -> None:
        in_the_middle.set()
        assert go_on.wait(30)
        remove(self, entry)

    monkeypatch.setattr(Cache, "remove", slowly)
    gone: list[CacheEntry] = []
    prunes = [Thread(target=lambda: gone.extend(Cache(cache.root).prune(0))) for _ in range(2)]
    prunes[0].start()
    assert in_the_middle.wait(30)
    prunes[1].start()
    prunes[1].join(0.3)
    assert prunes[1].is_alive()
    go_on.set()
    for prune in prunes:
        prune.join(30)
    assert len(gone) == len(folders)  # each was removed, and reported, once
    assert not any(folder.exists() for folder in folders)


def test_an_object_that_went_meanwhile_is_no_error(cache: Cache) -> None:
    put(cache, "twice")
    (entry,) = cache.entries()
    cache.remove(entry)
    cache.remove(entry)
    assert cache.entries() == []


@pytest.mark.parametrize("content", ["", '{"stage": "wri', "[]", "{}", '{"stage": "a", "files": []}', None])
def test_a_damaged_record_is_listed_told_and_removed(
    cache: Cache, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = put(cache, "broken") / "artifact.json"
    if content is None:
        file.unlink()
        file.mkdir()
    else:
        file.write_text(content)
    assert run(["cache", "ls"]) == 0
    assert run(["cache", "verify"]) == 6
    said = capsys.readouterr().out
    assert "artifact.json is damaged" in said
    assert "1 stages checked, 1 damaged and removed" in said
    assert cache.entries() == []
    file = put(cache, "broken") / "artifact.json"
    file.write_text(content or "")
    assert len(cache.prune(0)) == 1
    assert cache.read(put(cache, "broken").name) is not None


def test_read_removes_an_object_whose_record_is_damaged(cache: Cache) -> None:
    folder = put(cache, "broken")
    (folder / "artifact.json").write_text("[")
    assert cache.read(folder.name) is None
    assert not folder.exists()


def test_stray_files_are_left_alone(cache: Cache) -> None:
    folder = put(cache, "whole")
    strays = [cache.root / "objects" / ".DS_Store", folder.parent / ".DS_Store", cache.root / "work" / "Thumbs.db"]
    for stray in strays:
        stray.write_text("")
    cache.prepare()
    assert [entry.folder for entry in cache.entries()] == [folder]
    assert len(cache.prune(0)) == 1
    assert all(stray.exists() for stray in strays)


def test_a_folder_without_permission_names_itself_and_the_variable(cache: Cache) -> None:
    digest = put(cache, "mine").name
    with cache.lock(digest):  # what is imported on use is imported now
        pass
    with as_nobody(cache.root):
        for act in (cache.prepare, lambda: cache.read(digest), cache.lock(digest).__enter__, cache.used().__enter__):
            with pytest.raises(ModelError, match=str(cache.root)) as caught:
                act()
            assert "Permission denied" in caught.value.what
            assert "DIFFUSETTE_CACHE" in caught.value.hint
    assert cache.read(digest) is not None


def test_a_file_that_was_changed_since_is_noticed_on_a_hit(cache: Cache) -> None:
    folder = put(cache, "whole")
    (folder / "text.txt").write_text("hewol")  # the same size
    assert cache.read(folder.name) is None
    assert not folder.exists()


def test_a_file_that_was_copied_without_its_times_is_hashed_and_found_whole(cache: Cache) -> None:
    folder = put(cache, "whole")
    os.utime(folder / "text.txt", (1, 1))
    assert cache.read(folder.name) is not None


def test_bytes_that_the_disk_changed_are_found_by_verify(cache: Cache) -> None:
    folder = put(cache, "whole")
    rot(folder / "text.txt")
    assert cache.read(folder.name) is not None  # a hit does not read gigabytes
    assert [problem for _, problem in cache.damaged()] == ["text.txt has changed"]
    assert run(["cache", "verify"]) == 6
    assert not folder.exists()


def test_an_object_of_an_earlier_version_without_times_is_hashed(cache: Cache) -> None:
    folder = put(cache, "old")
    record = json.loads((folder / "artifact.json").read_text())
    del record["files"]["text.txt"]["written"]
    (folder / "artifact.json").write_text(json.dumps(record))
    assert cache.read(folder.name) is not None


def test_a_cap_is_kept_by_letting_the_longest_unused_go(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [put(cache, f"{number} of ten bytes"[:10]) for number in range(5)]
    for age, folder in enumerate(folders):
        os.utime(folder / "artifact.json", (1000 + age, 1000 + age))
    assert cache.keep_to_cap() == []  # nothing is said, nothing goes
    monkeypatch.setenv("DIFFUSETTE_CACHE_SIZE", "25")
    with cache.used():  # a conversion that still runs
        assert cache.keep_to_cap() == []
    assert [entry.folder for entry in cache.keep_to_cap()] == folders[:3]
    assert [folder.exists() for folder in folders] == [False, False, False, True, True]
    assert cache.keep_to_cap() == []


@pytest.mark.parametrize("text", ["much", "-1", "5XB", "1e9"])
def test_a_cap_that_is_no_size_is_told_before_the_work(
    cache: Cache, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIFFUSETTE_CACHE_SIZE", text)
    assert run(["convert", "demo", "-o", str(tmp_path / "out")]) == 2
    assert f"DIFFUSETTE_CACHE_SIZE: {text!r} is not a size" in capsys.readouterr().err
    assert cache.entries() == []
