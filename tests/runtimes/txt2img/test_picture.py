"""Pictures are written whole, and say how they were drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pytest
from diffusette.pipeline.errors import NoRoom, UsageError
from diffusette.runtimes.txt2img.generate import Drawing
from diffusette.runtimes.txt2img.picture import to_uint8, write_picture
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


def test_a_full_disk_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"old")

    def full(self: Image.Image, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(NoRoom, match="No space left"):
        write_picture(DRAWING, tmp_path / "a.png")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]
