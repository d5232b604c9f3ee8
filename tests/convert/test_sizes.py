"""Bundles of several sizes: equal files are one file on disk, and every bundle stays whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusette.bundle.pack import pack
from diffusette.bundle.pack_inputs import PackInputs
from diffusette.convert.request import Request
from diffusette.convert.sizes import convert_sizes, share_files


def test_equal_files_of_two_bundles_become_one(inputs: PackInputs, tmp_path: Path) -> None:
    small = pack(inputs, tmp_path / "64x64")
    (inputs.models[1].folder / "model.ort").write_bytes(b"ORTM of another size")
    large = pack(replace(inputs, size=(128, 128)), tmp_path / "128x128")
    equal = {entry for entry in set(small.manifest.files()) & set(large.manifest.files()) if entry.bytes}
    saved = share_files([small, large])
    assert {"unet/model.onnx", "unet/model.onnx_data"} <= {entry.path for entry in equal}
    assert all((small.path / entry.path).samefile(large.path / entry.path) for entry in equal)
    assert not (small.path / "vae_decoder/model.ort").samefile(large.path / "vae_decoder/model.ort")
    assert saved == sum(entry.bytes for entry in equal)
    for bundle in (small, large):
        assert not list(bundle.path.rglob("*.link"))
        bundle.refuse_damage()
    assert share_files([small, large]) == 0  # they are already


def test_a_file_that_was_damaged_is_not_spread(inputs: PackInputs, tmp_path: Path) -> None:
    small, large = pack(inputs, tmp_path / "a"), pack(replace(inputs, size=(128, 128)), tmp_path / "b")
    name = "unet/model.onnx_data"
    (small.path / name).write_bytes(b"x" * (small.path / name).stat().st_size)
    share_files([small, large])
    assert not (small.path / name).samefile(large.path / name)
    large.refuse_damage()


def test_each_size_gets_its_folder_once(inputs: PackInputs, tmp_path: Path) -> None:
    def convert_one(request: Request) -> Any:
        assert request.size
        bundle = pack(replace(inputs, size=request.size), Path(request.output))
        return SimpleNamespace(converted=(SimpleNamespace(bundle=bundle),), ok=True, to_json=dict)

    several = convert_sizes(Request("demo", tmp_path / "out"), [(64, 64), (64, 128), (64, 64)], convert_one)
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == ["64x128", "64x64"]
    assert several.ok
    assert several.shared_bytes > 0
    assert set(several.to_json()["sizes"]) == {"64x64", "64x128"}
