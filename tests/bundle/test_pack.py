"""A bundle folder: everything declared, nothing left over, the same bytes for the same input."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from diffusette.bundle import pack as packing
from diffusette.bundle.bundle import Bundle, open_bundle
from diffusette.bundle.manifest_entries import MemoryEntry, ParityEntry, SpeedEntry
from diffusette.bundle.pack import pack, packed_before, record, staged
from diffusette.bundle.pack_inputs import PackInputs, vae_entry
from diffusette.stages.errors import NoRoom, UsageError


def tree(root: Path) -> dict[str, bytes]:
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_packing_twice_gives_identical_trees(inputs: PackInputs, tmp_path: Path) -> None:
    one, two = pack(inputs, tmp_path / "one"), pack(inputs, tmp_path / "two")
    assert tree(one.path) == tree(two.path)
    assert one.manifest == two.manifest


def test_a_bundle_holds_what_it_declares_and_nothing_else(bundle: Bundle) -> None:
    assert set(tree(bundle.path)) == {
        "README.md",
        "licence/LICENSE.txt",
        "manifest.json",
        "schedules/ddim-3.json",
        "schedules/euler-2.json",
        "tokenizer/tokenizer.json",
        "unet/model.onnx",
        "unet/model.onnx_data",
        "vae_decoder/model.onnx",
        "vae_decoder/model.ort",
    }
    assert bundle.verify().ok
    assert bundle.verify().undeclared == ()


def test_no_path_of_this_machine_gets_into_a_bundle(inputs: PackInputs, tmp_path: Path) -> None:
    packed = pack(inputs, tmp_path / "out")
    for name, content in tree(packed.path).items():
        assert str(tmp_path).encode() not in content, name
        assert b"somewhere/private" not in content, name


def test_files_are_copies_and_no_links(bundle: Bundle, inputs: PackInputs) -> None:
    packed = bundle.path / "unet" / "model.onnx_data"
    assert packed.stat().st_nlink == 1
    packed.write_bytes(b"edited")
    assert (inputs.models[0].folder / "model.onnx_data").read_bytes() == bytes(64)


def test_models_that_a_target_built_in_a_folder_of_their_own_are_not_nested_twice(
    inputs: PackInputs, tmp_path: Path
) -> None:
    unet, vae = inputs.models
    nested = replace(unet, folder=unet.folder.parent, files=tuple(f"unet/{file}" for file in unet.files))
    packed = pack(replace(inputs, models=(nested, vae)), tmp_path / "out")
    assert packed.model("unet").files == ("unet/model.onnx", "unet/model.onnx_data")


def test_the_manifest_carries_the_inputs(bundle: Bundle, inputs: PackInputs) -> None:
    manifest = bundle.manifest
    assert manifest.recipe == inputs.recipe
    assert manifest.provenance.checkpoint == inputs.checkpoint.digest
    assert [source.file for source in manifest.provenance.sources] == ["model_index.json", "unet/config.json"]
    assert manifest.schedule.prediction_type == "epsilon"
    assert manifest.parity["unet"].snr_db == 999.0
    assert manifest.gate == "passed"


def test_the_readme_says_what_it_is_and_whose_the_weights_are(bundle: Bundle) -> None:
    text = (bundle.path / "README.md").read_text()
    assert "# tiny for ort" in text
    assert "| unet | fp32 | 32 |" in text
    assert "- vae_decoder: small" in text
    assert "licence of the checkpoint" in text or "under its licence" in text


def test_a_shift_that_a_config_does_not_state_is_none() -> None:
    assert vae_entry({"scaling_factor": 0.5, "shift_factor": None}).shift == 0.0
    assert vae_entry({"scaling_factor": 0.5, "shift_factor": 0.1}).shift == 0.1


def test_an_existing_bundle_is_kept_unless_it_is_to_be_replaced(inputs: PackInputs, bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="out: exists already"):
        pack(inputs, bundle.path)
    changed = pack(replace(inputs, recipe="schema = 1\n"), bundle.path, replace=True)
    assert changed.path == bundle.path
    assert open_bundle(bundle.path).manifest.recipe == "schema = 1\n"


def test_an_equal_bundle_is_known_again_and_any_other_is_not(inputs: PackInputs, bundle: Bundle) -> None:
    assert packed_before(inputs, bundle.path) == bundle
    assert packed_before(replace(inputs, gate="failed"), bundle.path) is None
    assert packed_before(inputs, bundle.path.parent / "nowhere") is None
    (inputs.models[1].folder / "model.ort").write_bytes(b"ORTX")
    assert packed_before(inputs, bundle.path) is None
    (inputs.models[1].folder / "model.ort").write_bytes(b"ORTM")
    assert packed_before(inputs, bundle.path) == bundle
    (bundle.path / "README.md").unlink()
    assert packed_before(inputs, bundle.path) is None


def test_a_model_that_was_damaged_in_the_cache_does_not_pass_for_whole(inputs: PackInputs, tmp_path: Path) -> None:
    folder = inputs.models[1].folder
    recorded = {"model.ort": {"bytes": 4, "sha256": hashlib.sha256(b"ORTM").hexdigest()}}
    (folder / "artifact.json").write_text(json.dumps({"files": recorded}))
    assert pack(inputs, tmp_path / "whole").verify().ok
    (folder / "model.ort").write_bytes(b"ORTX")
    damaged = pack(inputs, tmp_path / "damaged").verify()
    assert [bad.path for bad in damaged.bad] == ["vae_decoder/model.ort"]


def test_a_folder_that_is_no_bundle_is_never_replaced(inputs: PackInputs, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    pack(inputs, tmp_path / "out", replace=True)  # empty: nothing to lose
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"dear")
    (tmp_path / "file").write_bytes(b"dear")
    for name in ("photos", "file"):
        with pytest.raises(UsageError, match=f"{name}: is no bundle, and is not replaced"):
            pack(inputs, tmp_path / name, replace=True)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"dear"


def test_a_pack_that_fails_leaves_the_old_bundle_and_nothing_else(
    inputs: PackInputs, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(bundle.path)
    beside = sorted(bundle.path.parent.iterdir())
    (inputs.models[1].folder / "model.ort").rename(inputs.models[1].folder / "gone")
    monkeypatch.setattr(packing, "_bytes_needed", lambda _: 0)
    with pytest.raises(Exception, match=r"model.ort: cannot be read"):
        pack(inputs, bundle.path, replace=True)
    assert tree(bundle.path) == before
    assert sorted(bundle.path.parent.iterdir()) == beside


def test_a_bundle_that_cannot_fit_is_refused_first(
    inputs: PackInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_bytes_needed", lambda _: 2**60)
    with pytest.raises(NoRoom, match=r"out: the disk is full: [\d,.]+ MiB needed"):
        pack(inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_measurements_are_recorded_in_the_manifest_alone(bundle: Bundle) -> None:
    before = tree(bundle.path)
    unet = ParityEntry(max_abs=0.1, snr_db=60.0, psnr_db=70.0)
    changed = record(
        bundle,
        parity={"unet": unet},
        speed={"unet": SpeedEntry(ratio_to_fp32=1.5)},
        memory=MemoryEntry(measured={"unet": 120.0}),
        gate="skipped by --no-gate",
    )
    assert changed == open_bundle(bundle.path)
    assert changed.manifest.parity == {"unet": unet}
    assert changed.manifest.gate == "skipped by --no-gate"
    assert changed.manifest.recipe == bundle.manifest.recipe
    after = tree(bundle.path)
    assert {name for name in after if after[name] != before[name]} == {"manifest.json"}
    assert record(changed) == changed


def test_a_staged_bundle_reads_like_the_one_to_come_and_copies_no_model(inputs: PackInputs, tmp_path: Path) -> None:
    folder = tmp_path / "staged"
    folder.mkdir()
    manifest = staged(inputs, folder)
    assert open_bundle(folder).verify().ok
    assert manifest == pack(inputs, tmp_path / "packed").manifest
    model = next(model for model in inputs.models if model.component == "unet")
    assert (folder / "unet" / "model.onnx").samefile(model.folder / "model.onnx")
