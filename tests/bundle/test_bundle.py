"""A bundle from a stranger: whole, or refused with everything that is wrong with it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from diffusette.bundle.bundle import Bundle, open_bundle, verify_bundle
from diffusette.stages.errors import BundleError, UsageError
from diffusette.stages.hashing import sha256_of_file


def rewrite_manifest(root: Path, place: tuple[str | int, ...], facts: dict[str, object]) -> None:
    """Change some keys of the object at `place`."""
    plain = at = json.loads((root / "manifest.json").read_bytes())
    for step in place:
        at = at[step]
    at.update(facts)
    (root / "manifest.json").write_text(json.dumps(plain))


def test_a_whole_bundle_opens_and_verifies(bundle: Bundle) -> None:
    opened = open_bundle(str(bundle.path))
    assert opened == bundle
    assert opened.components == ("unet", "vae_decoder")
    found = opened.verify()
    assert found.ok
    assert found.undeclared == ()
    assert found.checked == sum(1 for file in bundle.path.rglob("*") if file.is_file()) - 1
    assert found == verify_bundle(bundle.path)


def test_a_model_is_what_the_target_opens(bundle: Bundle) -> None:
    model = bundle.model("unet")
    assert model.files == ("unet/model.onnx", "unet/model.onnx_data")
    assert all((model.folder / file).is_file() for file in model.files)
    assert (model.target, model.precision, model.bits_per_weight) == ("ort", "fp32", 32.0)
    assert model.inputs[0].shape == (16,)
    assert len(model.digest) == 64


def test_another_form_is_the_same_model_in_other_files(bundle: Bundle) -> None:
    plain, mobile = bundle.model("vae_decoder"), bundle.model("vae_decoder", "ort")
    assert mobile.files == ("vae_decoder/model.ort",)
    assert mobile.inputs == plain.inputs
    assert mobile.digest != plain.digest
    assert plain.forms == {"ort": ("vae_decoder/model.ort",)}
    assert plain.notes == ("small",)


def test_components_and_forms_that_are_not_there_are_named(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="component: unknown 'unte'") as caught:
        bundle.model("unte")
    assert caught.value.hint == "did you mean 'unet'?"
    with pytest.raises(UsageError, match="vae_decoder has no form 'mlir'") as caught:
        bundle.model("vae_decoder", "mlir")
    assert caught.value.hint == "it has: ort; small"
    with pytest.raises(UsageError, match="unet has no form 'ort'"):
        bundle.model("unet", "ort")


def test_schedules_are_read_back_with_the_default_first(bundle: Bundle) -> None:
    found = [(schedule.scheduler, schedule.steps) for schedule in bundle.schedules()]
    assert found == [("ddim", 2), ("ddim", 3), ("euler", 2)]


def test_a_schedule_is_chosen_by_name_and_steps_else_as_in_the_default(bundle: Bundle) -> None:
    def chosen(scheduler: str | None = None, steps: int | None = None) -> tuple[str, int]:
        found = bundle.schedule(scheduler, steps)
        return found.scheduler, found.steps

    assert chosen() == ("ddim", 2)
    assert chosen(steps=3) == ("ddim", 3)
    assert chosen("euler") == ("euler", 2)
    assert chosen("euler", 2) == ("euler", 2)
    with pytest.raises(UsageError, match="no schedule for ddim at 4 steps") as caught:
        bundle.schedule(steps=4)
    assert caught.value.hint.startswith("ddim has 2, 3 steps;")
    with pytest.raises(UsageError, match="no schedule for unipc at 2 steps") as caught:
        bundle.schedule("unipc")
    assert caught.value.hint.startswith("schedulers: ddim, euler;")


def test_damage_is_an_error_for_those_who_run_a_bundle(bundle: Bundle) -> None:
    bundle.refuse_damage()
    (bundle.path / "vae_decoder" / "model.ort").write_bytes(b"ORTX")
    with pytest.raises(BundleError, match=r"vae_decoder/model.ort: its bytes have changed"):
        bundle.refuse_damage()


def test_a_schedule_that_is_another_one_is_refused(bundle: Bundle) -> None:
    a, b = (bundle.path / "schedules" / f"{name}.json" for name in ("ddim-3", "euler-2"))
    a.write_bytes(b.read_bytes())
    with pytest.raises(BundleError, match=r"schedules/ddim-3.json: holds euler at 2 steps, not ddim at 3"):
        bundle.schedules()
    a.write_text("[")
    with pytest.raises(BundleError, match=r"schedules/ddim-3.json: no valid JSON"):
        bundle.schedules()


def test_one_flipped_byte_is_found_in_every_file(bundle: Bundle) -> None:
    for file in sorted(file for file in bundle.path.rglob("*") if file.is_file() and file.stat().st_size):
        whole = file.read_bytes()
        if file.name == "manifest.json":
            continue
        file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        found = open_bundle(bundle.path).verify()  # the size is right, so it opens
        path = file.relative_to(bundle.path).as_posix()
        assert [bad.path for bad in found.bad] == [path]
        assert "sha256" in found.bad[0].problem
        file.write_bytes(whole)
    assert bundle.verify().ok


def test_everything_that_is_wrong_is_listed_at_once(bundle: Bundle) -> None:
    (bundle.path / "unet" / "model.onnx_data").unlink()
    (bundle.path / "vae_decoder" / "model.ort").write_bytes(b"longer than it was")
    (bundle.path / "README.md").write_bytes(bytes((bundle.path / "README.md").stat().st_size))
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle.path)
    _, *lines = caught.value.what.splitlines()
    assert lines == [
        "  unet/model.onnx_data: is missing",
        "  vae_decoder/model.ort: 18 bytes instead of 4",
    ]
    assert "2 files are damaged" in caught.value.what
    found = verify_bundle(bundle.path)
    assert {bad.path for bad in found.bad} == {"unet/model.onnx_data", "vae_decoder/model.ort", "README.md"}


def test_a_damaged_file_is_exit_6_and_tells_what_to_do(bundle: Bundle) -> None:
    (bundle.path / "README.md").unlink()
    with pytest.raises(BundleError, match=r"1 file is damaged\n  README.md: is missing") as caught:
        open_bundle(bundle.path)
    assert caught.value.exit_code == 6
    assert "convert" in caught.value.hint


def test_undeclared_files_are_a_warning(bundle: Bundle) -> None:
    (bundle.path / "unet" / "notes.txt").write_text("mine")
    (bundle.path / ".DS_Store").write_bytes(b"litter")
    found = open_bundle(bundle.path).verify()
    assert found.ok
    assert found.undeclared == ("unet/notes.txt",)


def test_a_path_that_climbs_out_is_refused(bundle: Bundle) -> None:
    (bundle.path.parent / "secret").write_text("x")
    for path in ("../secret", "unet/../../secret", str(bundle.path.parent / "secret"), "..\\secret", "C:secret"):
        rewrite_manifest(bundle.path, ("assets", 0), {"path": path})
        with pytest.raises(BundleError, match=r"assets\[0\]: path = .*: must be a plain relative path"):
            open_bundle(bundle.path)


def test_symbolic_links_are_refused_wherever_they_lead(bundle: Bundle, tmp_path: Path) -> None:
    readme = bundle.path / "README.md"
    outside = tmp_path / "outside"
    outside.write_bytes(readme.read_bytes())
    for target in (outside, Path("licence/../README.copy")):
        (bundle.path / "README.copy").write_bytes(outside.read_bytes())
        readme.unlink()
        readme.symlink_to(target)
        with pytest.raises(BundleError, match=r"README.md: is a symbolic link"):
            open_bundle(bundle.path)


def test_a_linked_folder_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.path / "unet").rename(tmp_path / "elsewhere")
    (bundle.path / "unet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"unet/model.onnx: lies behind the symbolic link unet"):
        open_bundle(bundle.path)


def test_only_regular_files_count(bundle: Bundle) -> None:
    (bundle.path / "README.md").unlink()
    (bundle.path / "README.md").mkdir()
    with pytest.raises(BundleError, match=r"README.md: is not a regular file"):
        open_bundle(bundle.path)
    (bundle.path / "README.md").rmdir()
    os.mkfifo(bundle.path / "README.md")
    with pytest.raises(BundleError, match=r"README.md: is not a regular file"):
        open_bundle(bundle.path)


def test_the_manifest_itself_must_be_a_regular_file_of_sane_size(bundle: Bundle, tmp_path: Path) -> None:
    manifest = bundle.path / "manifest.json"
    manifest.rename(tmp_path / "elsewhere.json")
    manifest.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BundleError, match=r"manifest.json: is not a regular file"):
        open_bundle(bundle.path)
    manifest.unlink()
    with manifest.open("wb") as huge:
        huge.truncate(2**40)  # sparse
    with pytest.raises(BundleError, match=r"manifest.json: 1099511627776 bytes, at most"):
        open_bundle(bundle.path)


def test_a_folder_reached_through_a_link_is_still_a_bundle(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(bundle.path)
    assert open_bundle(tmp_path / "latest").path == bundle.path


def test_what_is_no_bundle_is_told_apart(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"empty: no manifest.json, so no bundle"):
        open_bundle(tmp_path / "empty")
    with pytest.raises(BundleError, match=r"nowhere: does not exist"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"manifest.json: is a file, a bundle is a folder"):
        open_bundle(bundle.path / "manifest.json")
    with pytest.raises(BundleError, match=r"below: does not exist"):
        open_bundle(bundle.path / "manifest.json" / "below")
    with pytest.raises(BundleError, match=r"cannot be opened: File name too long") as caught:
        open_bundle(tmp_path / ("x" * 300))
    assert caught.value.hint
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle.path.parent)
    assert caught.value.hint == "several targets were converted: give one of out in it"


def test_a_place_that_may_not_be_looked_at_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(BundleError, match=r"out: cannot be opened: Permission denied") as caught:
        open_bundle(tmp_path / "out")
    assert "rights" in caught.value.hint


def point_weights_at(bundle: Bundle, location: str) -> None:
    """Let the UNet's graph keep its weights at `location`, and make its hash and size in the manifest true again."""
    import onnx

    file = bundle.path / "unet" / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = location
    onnx.save(model, file)
    facts = {"sha256": sha256_of_file(file), "bytes": file.stat().st_size}
    rewrite_manifest(bundle.path, ("components", "unet", "files", 0), facts)


@pytest.mark.parametrize(
    "location",
    ["../vae_decoder/model.onnx", "/etc/hostname", "../../secret", "undeclared.bin", "..\\secret", "", "sub/../w"],
)
def test_onnx_weights_must_lie_in_declared_files(bundle: Bundle, location: str) -> None:
    (bundle.path / "unet" / "undeclared.bin").write_bytes(bytes(64))
    point_weights_at(bundle, location)
    opened = open_bundle(bundle.path)
    with pytest.raises(BundleError, match=r"unet/model.onnx: keeps weights in .*, which the manifest does not declare"):
        opened.model("unet")
    found = opened.verify()
    assert [bad.path for bad in found.bad] == ["unet/model.onnx"]
    assert opened.model("vae_decoder").component == "vae_decoder"


def test_onnx_weights_are_found_in_attributes_and_functions_too(bundle: Bundle) -> None:
    import onnx
    from onnx import TensorProto, helper

    stray = TensorProto(name="s", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    stray.external_data.add(key="location", value="../secret")
    constant = helper.make_node("Constant", [], ["c"], value=stray)
    branch = helper.make_graph([constant], "b", [], [])
    choice = helper.make_node("If", ["k"], [], then_branch=branch, else_branch=branch)
    file = bundle.path / "unet" / "model.onnx"
    whole = onnx.load(file, load_external_data=False)
    for hiding in (
        onnx.ModelProto(graph=onnx.GraphProto(node=[constant])),
        onnx.ModelProto(graph=onnx.GraphProto(node=[choice])),
        onnx.ModelProto(functions=[helper.make_function("d", "f", [], ["c"], [constant], [])]),
    ):
        model = onnx.ModelProto()
        model.CopyFrom(whole)
        model.MergeFrom(hiding)
        onnx.save(model, file)
        with pytest.raises(BundleError, match=r"keeps weights in '../secret'"):
            bundle.model("unet")


def test_a_graph_that_is_none_is_refused(bundle: Bundle) -> None:
    file = bundle.path / "unet" / "model.onnx"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(BundleError, match=r"model.onnx: holds no ONNX graph"):
        open_bundle(bundle.path).model("unet")
    assert [bad.path for bad in verify_bundle(bundle.path).bad] == ["unet/model.onnx"]
