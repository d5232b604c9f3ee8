"""Bundles of strangers: nothing outside of the folder is read or written, and damage is exit 6."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from diffusette.bundle.bundle import Bundle, open_bundle, verify_bundle
from diffusette.bundle.manifest import parse_manifest
from diffusette.bundle.stray_weights import stray_weights
from diffusette.cli import run
from diffusette.export.compiled_schedule import CompiledSchedule
from diffusette.stages.errors import BundleError
from diffusette.stages.hashing import sha256_of_file
from hypothesis import example, given

from ..bundle import tiny_bundle as bundles
from .guard import ALLOWED, answer
from .hostile import as_json, cases, edited, nested, scratched, values

inputs, bundle = bundles.inputs, bundles.bundle


@pytest.fixture
def whole(bundle: Bundle) -> Any:
    return json.loads((bundle.path / "manifest.json").read_bytes())


def use(folder: Path) -> None:
    """All that our own code reads of a bundle before a runtime sees a file of it."""
    opened = open_bundle(folder)
    opened.schedules()
    for component in opened.components:
        opened.model(component)
        opened.plan(component)
    opened.verify()


def test_manifests_of_any_content(bundle: Bundle, whole: Any) -> None:
    file = bundle.path / "manifest.json"

    @cases(300)
    @given(document=edited(whole) | values)
    def any_content(document: Any) -> None:
        file.write_bytes(as_json(document))
        answer(lambda: use(bundle.path), bundle.path)
        answer(lambda: verify_bundle(bundle.path), bundle.path)

    any_content()


def test_manifests_of_any_bytes(bundle: Bundle, whole: Any) -> None:
    small = {**whole, "assets": [], "provenance": whole["provenance"]}

    @cases(200)
    @given(content=scratched(as_json(small)))
    @example(content=nested(10**6).encode())
    @example(content=nested(10**5, '{"schema":', "}").encode())
    @example(content=b'{"schema": 1' + b"0" * 10**5 + b"}")
    @example(content=b'{"schema": 1e999}')
    def any_bytes(content: bytes) -> None:
        answer(lambda: parse_manifest(content), bundle.path)

    any_bytes()


def test_schedules_of_any_content(bundle: Bundle, whole: Any) -> None:
    schedule = whole["schedule"]["default"]

    @cases(200)
    @given(document=edited(schedule) | values)
    def any_content(document: Any) -> None:
        answer(lambda: CompiledSchedule.from_json(document), bundle.path)

    any_content()


def declared(bundle: Bundle) -> Iterator[str]:
    yield "manifest.json"
    yield from dict.fromkeys(file.path for file in bundle.manifest.files())


KINDS = ("pipe", "device", "link out", "link in", "link to itself", "folder", "socket", "nothing")


@pytest.mark.parametrize("kind", KINDS)
def test_only_plain_files_of_its_own_are_read(kind: str, bundle: Bundle, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in declared(bundle):
        copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
        place(kind, copy / name, outside / "file")
        refusal = answer(lambda copy=copy: use(copy), copy)  # type: ignore[misc]
        assert isinstance(refusal, BundleError), name
        code = run(["verify", str(copy)])
        assert code in ALLOWED, name
        shutil.rmtree(copy)


def place(kind: str, at: Path, outside: Path) -> None:
    import socket

    outside.write_bytes(at.read_bytes())  # the very bytes: only where they lie is wrong
    at.unlink()
    if kind == "pipe":
        os.mkfifo(at)
    elif kind == "device":
        try:
            os.mknod(at, 0o666 | 0o020000, os.makedev(1, 5))  # S_IFCHR, what /dev/zero is
        except PermissionError:
            pytest.skip("only root makes devices")
    elif kind == "link out":
        at.symlink_to(outside)
    elif kind == "link in":
        at.with_name("hidden").write_bytes(outside.read_bytes())
        at.symlink_to("hidden")
    elif kind == "link to itself":
        at.symlink_to(at.name)
    elif kind == "folder":
        at.mkdir()
    elif kind == "socket":
        listening = socket.socket(socket.AF_UNIX)
        here = Path.cwd()
        os.chdir(at.parent)  # a socket's path has at most 107 bytes
        listening.bind(at.name)
        os.chdir(here)
        listening.close()


LOCATIONS = st.one_of(
    st.sampled_from(
        ("model.onnx_data", "./model.onnx_data", "../vae_decoder/model.onnx", "/etc/passwd", "../../secret",
         "..\\secret", "link", "sub/../../x", "\0", "", ".", "..", "~/x", "file:///etc/passwd", "a" * 5000,
         "C:secret", "//host/share", "model.onnx", "hidden.bin")
    ),
    st.text(max_size=12),
)  # fmt: skip
NUMBERS = st.sampled_from(("0", "64", "-1", "9" * 30, "9" * 5000, "x", "", "1e3", "0x10", "٣", " 64 "))
ENTRY = st.fixed_dictionaries({"location": LOCATIONS}, optional={"offset": NUMBERS, "length": NUMBERS})
DIMS = st.lists(st.sampled_from((0, 1, 4, 16, -1, 2**40, 2**62, 2**63 - 1)), max_size=4)


@cases(300)
@given(entry=ENTRY, dims=DIMS, kind=st.integers(0, 40) | st.sampled_from((10**6, -1)))
def test_onnx_weights_lie_in_the_declared_files_or_nowhere(
    entry: dict[str, str], dims: list[int], kind: int, tmp_path: Path
) -> None:
    import onnx
    from diffusette.runtimes.ort.external_data import read_graph

    root = tmp_path / "bundle"
    (root / "unet").mkdir(parents=True, exist_ok=True)
    (root / "unet" / "model.onnx_data").write_bytes(bytes(64))
    (root / "unet" / "hidden.bin").write_bytes(bytes(64))
    (tmp_path / "secret").write_bytes(bytes(64))
    if not (root / "unet" / "link").is_symlink():
        (root / "unet" / "link").symlink_to("../../secret")
    w = onnx.TensorProto(name="w", data_type=kind, dims=dims, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in entry.items():
        w.external_data.add(key=key, value=value)
    graph = root / "unet" / "model.onnx"
    onnx.save(onnx.ModelProto(graph=onnx.GraphProto(name="g", initializer=[w])), graph)

    strays: list[tuple[str, str]] = []
    files = ("unet/model.onnx", "unet/model.onnx_data")
    assert answer(lambda: strays.extend(stray_weights(root, files)), root) is None
    real = os.path.normpath(root / "unet" / entry["location"]) if "\0" not in entry["location"] else ""
    assert bool(strays) == (real not in {str(root / file) for file in files} or "/" in entry["location"])
    if not answer(lambda: read_graph(graph), root):
        assert (
            real == str(root / "unet" / "model.onnx_data")
            or real == str(root / "unet" / "hidden.bin")
            or real == str(graph)
        )


def test_graphs_of_any_bytes(bundle: Bundle, tmp_path: Path) -> None:
    from diffusette.convert.describe import describe
    from diffusette.runtimes.ort.external_data import read_graph

    file = bundle.path / "unet" / "model.onnx"
    (bundle.path / "unet" / "other.onnx").write_bytes(file.read_bytes())

    @cases(250)
    @given(content=scratched(file.read_bytes()))
    @example(content=b"")
    @example(content=file.read_bytes().replace(b"model.onnx_data", b"\xff\xff\xff\xffl.onnx_data"))
    def any_bytes(content: bytes) -> None:
        file.write_bytes(content)
        answer(lambda: stray_weights(bundle.path, ("unet/model.onnx",)), bundle.path)
        answer(lambda: read_graph(file), bundle.path)
        answer(lambda: describe(str(file)), bundle.path)

    any_bytes()


def test_a_bundle_whose_hashes_are_true_may_still_be_hostile(bundle: Bundle) -> None:
    """Who makes a bundle also makes its manifest: hashes prove that it is whole, not that it is kind."""
    file = bundle.path / "unet" / "model.onnx"
    content, manifest = file.read_bytes(), bundle.path / "manifest.json"
    stated = json.loads(manifest.read_bytes())

    @cases(100)
    @given(content=scratched(content))
    def any_bytes(content: bytes) -> None:
        file.write_bytes(content)
        entry = stated["components"]["unet"]["files"][0]
        entry |= {"bytes": len(content), "sha256": sha256_of_file(file)}
        manifest.write_bytes(as_json(stated))
        answer(lambda: use(bundle.path), bundle.path)

    any_bytes()
