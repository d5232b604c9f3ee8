"""Pictures are written whole, and say how they were drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pytest
from diffusette.cli import run
from diffusette.runtimes.txt2img.generate import Drawing
from diffusette.runtimes.txt2img.picture import refuse_unwritable_picture, to_uint8, write_picture
from diffusette.stages.errors import NoRoom, UsageError
from PIL import Image

IMAGE: Final = np.linspace(0, 1, 8 * 6 * 3, dtype=np.float32).reshape(8, 6, 3)
DRAWING: Final = Drawing(
    image=IMAGE,
    latents=np.zeros((1, 4, 1, 1), np.float32),
    trajectory=(),
    prompt="ein roter Kreis 🔴",
    negative="",
    seed=2**63,
    steps=20,
    scheduler="ddim",
    guidance=4.0,
    warnings=(),
)


def test_a_picture_is_rounded_to_the_nearest_byte(tmp_path: Path) -> None:
    write_picture(DRAWING, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as read:
        assert read.size == (6, 8)
        assert np.abs(np.asarray(read) / 255 - IMAGE).max() <= 0.5 / 255 + 1e-6
    assert to_uint8(np.array([[[0.0, 1.0, 0.4999]]], np.float32)).tolist() == [[[0, 255, 127]]]


def test_a_picture_says_how_it_was_drawn(tmp_path: Path) -> None:
    write_picture(DRAWING, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as read:
        assert {
            key: read.info[key] for key in ("prompt", "negative_prompt", "seed", "steps", "scheduler", "guidance")
        } == {
            "prompt": "ein roter Kreis 🔴",
            "negative_prompt": "",
            "seed": str(2**63),
            "steps": "20",
            "scheduler": "ddim",
            "guidance": "4.0",
        }


def test_the_same_drawing_gives_the_same_bytes_and_replaces_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    for name in ("a.png", "b.png"):
        write_picture(DRAWING, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_folder_that_is_not_there_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write_picture(DRAWING, tmp_path / "missing" / "a.png")


def test_another_format_is_refused_rather_than_written_under_a_wrong_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png"):
        write_picture(DRAWING, tmp_path / "a.jpg")


@pytest.mark.parametrize("name", ["a.jpg", "a", "folder", "folder.png", "missing/a.png", "file.txt/a.png", "x" * 300])
def test_a_picture_that_could_not_be_written_is_refused_before_it_is_drawn(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("")
    for folder in ("folder", "folder.png"):
        (tmp_path / folder).mkdir()
    before = sorted(tmp_path.rglob("*"))
    for refuse in (refuse_unwritable_picture, lambda path: write_picture(DRAWING, path)):
        with pytest.raises(UsageError, match=r"cannot be written|written as \.png|is a folder") as caught:
            refuse(tmp_path / name)
        assert caught.value.hint
    assert run(["generate", str(tmp_path / "no bundle"), "a prompt", "-o", str(tmp_path / name)]) == 2
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_a_folder_in_the_place_of_a_picture_gets_a_name_for_it(name: str) -> None:
    with pytest.raises(UsageError, match="is a folder") as caught:
        refuse_unwritable_picture(Path(name))
    assert caught.value.hint.endswith("picture.png")


def test_looking_whether_a_picture_could_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    refuse_unwritable_picture(tmp_path / "a.png")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_a_full_disk_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"old")

    def full(self: Image.Image, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(NoRoom, match="No space left"):
        write_picture(DRAWING, tmp_path / "a.png")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]
