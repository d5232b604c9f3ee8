"""manifest.json: strict, canonical, and never a way out of the folder."""

from __future__ import annotations

import json
import math
import ntpath
import posixpath
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
from diffusette.bundle.bundle import Bundle
from diffusette.bundle.manifest import MAX_BYTES, Manifest, parse_manifest, schema_json
from diffusette.bundle.manifest_entries import ParityEntry, RelativePath
from diffusette.stages.errors import BundleError
from diffusette.stages.safe_path import inside
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError


@pytest.fixture
def plain(bundle: Bundle) -> dict[str, Any]:
    """The bundle's manifest as JSON gives it."""
    found: dict[str, Any] = json.loads((bundle.path / "manifest.json").read_bytes())
    return found


def parse(plain: object) -> Manifest:
    return parse_manifest(json.dumps(plain).encode())


def refusal(plain: object) -> BundleError:
    with pytest.raises(BundleError) as caught:
        parse(plain)
    assert caught.value.exit_code == 6
    return caught.value


def test_reading_and_writing_are_inverse_to_the_byte(bundle: Bundle) -> None:
    text = (bundle.path / "manifest.json").read_text("utf-8")
    assert parse_manifest(text.encode()).to_json() == text
    assert parse_manifest(text.encode()) == bundle.manifest
    assert text.endswith("}\n")
    assert "ünchanged" in text


def test_the_keys_are_those_of_the_design(plain: dict[str, Any]) -> None:
    assert set(plain) == {
        "schema", "name", "family", "target", "components", "tokenizer", "tokenizer_2", "schedule", "guidance",
        "conditioning", "control", "vae",
        "time_embedding", "size", "recipe", "provenance", "parity", "speed", "memory", "gate", "arithmetic",
        "assets",
    }  # fmt: skip
    assert plain["schema"] == 2
    assert set(plain["target"]) == {"name", "version", "min_runtime"}
    unet = plain["components"]["unet"]
    assert set(unet) == {
        "precision", "bits_per_weight", "plan", "schemes", "files", "inputs", "outputs", "forms", "notes",
    }  # fmt: skip
    assert set(unet["files"][0]) == {"path", "sha256", "bytes"}
    assert unet["inputs"] == [{"name": "x", "dtype": "float32", "shape": [16]}]
    assert set(plain["tokenizer"]) == {"kind", "files", "max_tokens", "pad_id", "bos_id", "eos_id", "added_tokens"}
    assert set(plain["schedule"]) == {"default", "prediction_type", "timestep_spacing", "others"}
    assert set(plain["schedule"]["others"][0]) == {"name", "steps", "path", "sha256", "bytes"}
    assert plain["tokenizer_2"] is None
    assert plain["conditioning"] == {
        "variant": "base", "why": "made by a test", "text_encoders": 1, "zeros_for_empty": False, "time_ids": False,
        "input_channels": 4,
    }  # fmt: skip
    assert plain["guidance"] == {"mode": "cfg", "default": 7.5}
    assert plain["vae"] == {
        "scaling_factor": 0.18215,
        "shift": 0.0,
        "encoder_scaling_factor": 0.18215,
        "encoder_shift": 0.0,
        "force_upcast": False,
    }
    assert set(plain["time_embedding"]) == {"dim", "flip_sin_to_cos", "freq_shift", "max_period"}
    assert set(plain["provenance"]) == {"checkpoint", "sources", "adapters", "tools"}
    assert set(plain["memory"]) == {"forecast", "measured"}
    assert set(plain["parity"]["unet"]) == {"max_abs", "snr_db", "psnr_db"}


def test_equal_tensors_are_999_decibels_apart_and_nan_is_refused() -> None:
    exact = ParityEntry(max_abs=0.0, snr_db=math.inf, psnr_db=-math.inf)
    assert (exact.snr_db, exact.psnr_db) == (999.0, -999.0)
    with pytest.raises(ValidationError):
        ParityEntry(max_abs=0.0, snr_db=math.nan, psnr_db=1.0)
    with pytest.raises(ValidationError):
        ParityEntry(max_abs=math.inf, snr_db=1.0, psnr_db=1.0)


def test_a_newer_schema_is_named_before_its_unknown_keys(plain: dict[str, Any]) -> None:
    error = refusal({**plain, "schema": 3, "hologram": {}})
    assert error.what == "manifest.json: schema 3: written by a newer diffusette; this one reads up to 2"
    assert error.hint == "install a newer diffusette"


@pytest.mark.parametrize("schema", [0, -1, True, "1", 1.0, None, []])
def test_a_schema_that_never_was_is_refused(plain: dict[str, Any], schema: object) -> None:
    assert "manifest.json: schema = " in refusal({**plain, "schema": schema}).what


def test_unknown_keys_are_refused_at_every_level(plain: dict[str, Any]) -> None:
    error = refusal({**plain, "recipee": ""})
    assert (error.what, error.hint) == ("manifest.json: unknown 'recipee'", "did you mean 'recipe'?")
    plain["components"]["unet"]["files"][1]["sha265"] = ""
    error = refusal(plain)
    assert error.what == "manifest.json: components.unet.files[1]: unknown 'sha265'"
    assert error.hint == "did you mean 'sha256'?"


EXACT = {"max_abs": 0, "snr_db": 999, "psnr_db": 999}


def replaced(plain: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    copy: Any = json.loads(json.dumps(plain))
    at = copy
    *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    for step in way:
        at = at[step]
    if value is None:
        del at[last]
    else:
        at[last] = value
    found: dict[str, Any] = copy
    return found


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("schema", None, "manifest.json: 'schema' is missing"),
        ("gate", None, "manifest.json: 'gate' is missing"),
        ("gate", "maybe", "gate = \"maybe\": should be 'passed', 'failed' or 'skipped by --no-gate'"),
        ("components", {}, "components = {}: "),
        ("components.unet.files", [], "components.unet: files = []"),
        ("components.unet.files.0.sha256", "0" * 63, "components.unet.files[0]: sha256 = "),
        ("components.unet.files.0.sha256", "A" * 64, "components.unet.files[0]: sha256 = "),
        ("components.unet.files.0.bytes", -1, "components.unet.files[0]: bytes = -1"),
        ("components.unet.files.0.bytes", "10", 'components.unet.files[0]: bytes = "10"'),
        ("components.unet.files.0.path", "manifest.json", "manifest.json declares itself"),
        ("components.unet.files.0.path", "MANIFEST.JSON", "manifest.json declares itself"),
        ("components.unet.files.0.path", "vae_decoder/Model.onnx", "is declared twice, differently"),
        ("components.unet.inputs.0.dtype", "object", "components.unet.inputs[0]: dtype = "),
        ("components.unet.inputs.0.shape", [0], "components.unet.inputs[0]: shape[0] = 0"),
        ("components.unet.bits_per_weight", 0, "components.unet: bits_per_weight = 0"),
        ("size", [64], "'size[1]' is missing"),
        ("size", [64, -8], "size[1] = -8"),
        ("vae.scaling_factor", 0, "vae: scaling_factor = 0"),
        ("tokenizer.kind", "t5", 'tokenizer: kind = "t5"'),
        ("tokenizer.pad_id", True, "tokenizer: pad_id = true"),
        ("provenance.sources.0.file", "/home/someone/model.safetensors", "provenance.sources[0]: file = "),
        ("parity.controlnet", EXACT, "parity speaks of controlnet, which the bundle lacks"),
        ("parity.wheel", EXACT, "parity"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(plain: dict[str, Any], path: str, value: object, what: str) -> None:
    assert what in refusal(replaced(plain, path, value)).what


def test_a_controlnet_and_what_the_unet_takes_of_it_go_together(plain: dict[str, Any]) -> None:
    control = {"scale": 1.0, "residuals": {"mid_block_res_sample": "mid_block_additional_residual"}}
    together = "a ControlNet and 'control' go together"
    assert together in refusal(replaced(plain, "control", control)).what
    residual = {"name": "mid_block_res_sample", "dtype": "float32", "shape": [1, 4, 8, 8]}
    steered = json.loads(json.dumps(plain))
    unet = steered["components"]["unet"]
    steered["components"]["controlnet"] = {**unet, "outputs": [residual]}
    assert together in refusal(steered).what
    steered["control"] = control
    assert "no 'mid_block_res_sample' of the ControlNet fits a 'mid_block_add" in refusal(steered).what
    taken = {**residual, "name": "mid_block_additional_residual"}
    steered["components"]["unet"] = {**unet, "inputs": [*unet["inputs"], taken]}
    assert parse(steered).control
    assert "fits a" in refusal(replaced(steered, "components.controlnet.outputs.0.shape", [1, 4, 8, 4])).what
    assert "fits a" in refusal(replaced(steered, "control.residuals", {"elsewhere": "sample"})).what
    assert "scale = -1" in refusal(replaced(steered, "control.scale", -1)).what


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("size", [2**20 + 1, 64]),
        ("size", [10**400, 64]),
        ("components.unet.inputs.0.shape", [2**31 + 1]),
        ("components.unet.inputs.0.shape", [2**20, 2**20]),
        ("components.unet.outputs.0.shape", [1] * 9),
        ("components.unet.outputs.0.shape", [1] * 100_000),
        ("components.unet.files.0.bytes", 2**43 + 1),
        ("schedule.others.0.bytes", 2**63),
        ("schedule.others.0.steps", 2**40),
        ("tokenizer.max_tokens", 2**16 + 1),
        ("tokenizer.pad_id", 2**31),
        ("tokenizer.bos_id", -1),
        ("tokenizer.eos_id", 10**400),
        ("time_embedding.dim", 2**16 + 2),
        ("time_embedding.dim", 47),
        ("time_embedding.max_period", 10**400),
        ("vae.scaling_factor", 10**400),
    ],
)
def test_numbers_that_nobody_makes_are_refused(plain: dict[str, Any], path: str, value: object) -> None:
    error = refusal(replaced(plain, path, value))
    assert path.split(".")[-1] in error.what
    assert len(error.what) < 400


def test_the_largest_numbers_are_taken(plain: dict[str, Any]) -> None:
    limits = {
        "size": [2**20, 2**20],
        "components.unet.inputs.0.shape": [1, 1, 1, 1, 1, 1, 2**15, 2**16],
        "components.unet.outputs.0.shape": [],
        "components.unet.files.0.bytes": 2**43,
        "tokenizer.max_tokens": 2**16,
        "tokenizer.pad_id": 2**31 - 1,
        "time_embedding.dim": 2**16,
    }
    for path, value in limits.items():
        plain = replaced(plain, path, value)
    assert parse(plain).tokenizer.max_tokens == 2**16


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "no valid JSON"),
        (b"[]", "no JSON object"),
        (b'{"schema": 1, "name": "a", "name": "b"}', "the key 'name' appears twice"),
        (b'{"schema": NaN}', "NaN is not JSON"),
        (b'{"schema": -Infinity}', "-Infinity is not JSON"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b'{"schema": 1, "name": 1e999}', "manifest.json: "),
        (b"[" * 100_000, "no valid JSON"),
        (b'{"a":' * 100_000, "no valid JSON"),
        (b"\xff\xfe", "no valid JSON"),
        (b'{"name": "\xff"}', "no valid JSON"),
        (b" " * (MAX_BYTES + 1), f"{MAX_BYTES + 1} bytes, at most {MAX_BYTES} are read"),
    ],
    ids=["empty", "list", "twice", "nan", "infinity", "digits", "1e999", "deep", "deeper", "utf16", "latin1", "huge"],
)
def test_hostile_text_is_refused(text: bytes, what: str) -> None:
    with pytest.raises(BundleError) as caught:
        parse_manifest(text)
    assert what in caught.value.what
    assert len(caught.value.what) < 2000


def test_every_truncation_is_refused(bundle: Bundle) -> None:
    text = (bundle.path / "manifest.json").read_bytes()
    for length in range(0, len(text) - 2, 97):
        with pytest.raises(BundleError, match="no valid JSON"):
            parse_manifest(text[:length])


HOSTILE = [
    "", ".", "..", "/", "/etc/passwd", "../x", "a/../../x", "a/..", "./a", "a/./b", "a//b", "a/", "//server/share",
    "\\x", "a\\..\\x", "C:x", "C:/x", "c:\\x", "a:b", "file\x00", "a\nb", "...", "a./b", "a /b", "nul", "aux.txt",
    "a/COM1", "lpt9.bin", "a\u202eb", "x" * 1025, "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("path", HOSTILE)
def test_paths_that_some_system_reads_otherwise_are_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(RelativePath).validate_python(path)


@pytest.mark.parametrize("path", ["a", "unet/model.onnx", "a b/ü.bin", "..a/b..c", ".hidden", "com/1", "console"])
def test_plain_paths_are_kept(path: str) -> None:
    assert TypeAdapter(RelativePath).validate_python(path) == path


SEGMENTS = st.sampled_from(["..", ".", "", "a", "a.b", "C:", "con", " ", "\\", "..\\..", "~", "%2e%2e", "\x00"])


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(SEGMENTS, max_size=6).map("/".join), st.lists(SEGMENTS).map("\\".join)))
def test_no_path_climbs_out_on_any_system(path: str) -> None:
    try:
        accepted = inside(path)
    except ValueError:
        return
    assert accepted == path
    joined = posixpath.normpath(posixpath.join("/bundle", path))
    assert joined == f"/bundle/{path}"  # also: nothing to normalise, so one file has one name
    windows = ntpath.normpath(ntpath.join("C:\\bundle", path))
    assert windows.startswith("C:\\bundle\\")
    assert not PurePosixPath(path).is_absolute()
    assert not PureWindowsPath(path).anchor
    assert Path("/bundle", path).is_relative_to("/bundle")


def test_the_json_schema_names_every_key(plain: dict[str, Any]) -> None:
    schema = json.loads(schema_json())
    assert set(schema["properties"]) == set(plain)
    assert schema["additionalProperties"] is False
    assert schema_json() == schema_json()
