"""Several sizes by one command: a whole bundle each, and one copy on disk of what they share."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from .conftest import Command


def test_two_sizes_are_two_bundles_that_share_their_weights(command: Command, tmp_path: Path) -> None:
    sizes = ["--size", "64x64", "--size", "64x96", "--size", "64x64"]  # asked for twice, made once
    answer = command("convert", "demo", "-o", tmp_path / "out", "--target", "ncnn", *sizes, "--no-gate", "--json")
    assert answer.code == 0, answer.err
    assert list(answer.json["sizes"]) == ["64x64", "64x96"]
    square, wide = (tmp_path / "out" / name for name in ("64x64", "64x96"))
    weights = {file.relative_to(square) for file in square.rglob("*.bin")}
    assert weights
    assert all((square / name).samefile(wide / name) for name in weights)
    assert answer.json["shared_bytes"] >= sum((square / name).stat().st_size for name in weights)
    for folder, size in ((square, (64, 64)), (wide, (96, 64))):
        assert command("verify", folder).code == 0
        assert command("generate", folder, "a red star", "-o", tmp_path / "star.png", "--steps", 10).code == 0
        with Image.open(tmp_path / "star.png") as picture:
            assert picture.size == size  # width, height
