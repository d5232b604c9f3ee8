"""ncnn's two files, the fingerprints that tell where weights went, and the gates around pnnx."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusette.runtimes.fingerprints import Fingerprints
from diffusette.runtimes.ncnn import layout, param, pnnx, slots
from diffusette.stages.errors import ExportError, ModelError, NoRoom, ToolCrashed

GRAPH = """7767517
4 4
Input                    in0                      0 1 in0
MemoryData               mask                     0 1 1 0=3
Gemm                     gemm_0                   1 1 in0 2 2=0 3=1 5=1 6=1 7=1 8=2 9=3 10=4
BinaryOp                 add                      2 1 2 1 out0 0=0
"""
SHAPES = {"proj.weight": (2, 3), "proj.bias": (2,)}


@pytest.fixture
def fingerprints() -> Fingerprints:
    return Fingerprints(SHAPES)


def words(*parts: object) -> bytes:
    return b"".join(np.asarray(part).astype("<u4").tobytes() for part in parts)


def bin_of(fingerprints: Fingerprints, *, axes: tuple[int, ...] = (0, 1)) -> bytes:
    mask = np.array([0, -1e4, 0], np.float32).view(np.uint32)
    weight = fingerprints.patterns("proj.weight").transpose(axes)
    return words(mask, 0, weight, 0, fingerprints.patterns("proj.bias"))


def learn(data: bytes, fingerprints: Fingerprints, tmp_path: Path) -> tuple[tuple[layout.Blob, ...], bytes]:
    (tmp_path / "x.bin").write_bytes(data)
    literals = io.BytesIO()
    blobs = layout.learn(param.parse(GRAPH), tmp_path / "x.bin", fingerprints, literals)
    return blobs, literals.getvalue()


# --- .param -----------------------------------------------------------------------------------------------------------


def test_graph_survives_reading_and_writing() -> None:
    assert param.render(param.parse(GRAPH)) == GRAPH


def test_renamed_blobs_reach_every_layer_that_uses_them() -> None:
    renamed = param.render(param.rename_blobs(param.parse(GRAPH), {"in0": "sample", "out0": "out_sample"}))
    assert "in0" not in renamed
    assert "Input                    sample                   0 1 sample" in renamed
    assert "1 1 sample 2" in renamed
    assert "2 1 2 1 out_sample 0=0" in renamed


@pytest.mark.parametrize("names", [{"in7": "sample"}, {"in0": "out0"}])
def test_renaming_refuses_absent_and_taken_names(names: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="blob"):
        param.rename_blobs(param.parse(GRAPH), names)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7767516\n0 0\n",
        GRAPH[: GRAPH.index("BinaryOp")],
        GRAPH.replace("0 1 in0", "0 9 in0"),
        GRAPH + "Input x y\n",
    ],
    ids=["empty", "magic", "cut", "too few blobs", "broken line"],
)
def test_damaged_graph_is_refused(text: str) -> None:
    with pytest.raises(ModelError):
        param.parse(text)


# --- .bin -------------------------------------------------------------------------------------------------------------


def test_bin_of_the_right_length_passes(fingerprints: Fingerprints, tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    file.write_bytes(bin_of(fingerprints))
    slots.check_bin(param.parse(GRAPH), file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-4], "needs"),
        (lambda data: data + bytes(4), "needs"),
        (lambda data: b"", "needs"),
        (lambda data: data[:12] + b"\x02" + data[13:], "no weight starts"),
    ],
    ids=["cut", "longer", "empty", "tag"],
)
def test_bin_that_does_not_fit_the_graph_is_refused(
    damage: Callable[[bytes], bytes], message: str, fingerprints: Fingerprints, tmp_path: Path
) -> None:
    file = tmp_path / "x.bin"
    file.write_bytes(damage(bin_of(fingerprints)))
    with pytest.raises(ModelError, match=message):
        slots.check_bin(param.parse(GRAPH), file)


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_no_two_parameters_share_a_fingerprint() -> None:
    shapes = {f"p{index}": shape for index, shape in enumerate([(64, 32, 3, 3), (64,), (), (1,), (5, 5), (7, 2, 3)])}
    fingerprints = Fingerprints(shapes)
    found = [set(fingerprints.patterns(name).ravel().tolist()) for name in shapes]
    assert sum(map(len, found)) == len(set().union(*found))
    assert all(
        fingerprints.owner(pattern) == name for name, part in zip(shapes, found, strict=True) for pattern in part
    )


def test_stub_tensor_has_the_patterns_and_hardly_any_memory() -> None:
    fingerprints = Fingerprints({"big": (4096, 4096), "small": (3, 2)})
    stub = fingerprints.stub("big")
    assert stub.untyped_storage().nbytes() < 64 * 1024
    assert np.array_equal(fingerprints.stub("small").numpy().view(np.uint32), fingerprints.patterns("small"))


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (1, 0, 2, 3), (0, 1, 3, 2), (2, 3, 1, 0)])
def test_order_of_axes_is_recognised(axes: tuple[int, ...]) -> None:
    fingerprints = Fingerprints({"a": (4,), "conv": (3, 3, 3, 3)})
    flat = fingerprints.patterns("conv").transpose(axes).ravel()
    assert fingerprints.recognise(flat) == ("conv", axes)


def test_a_part_or_a_changed_element_is_not_recognised() -> None:
    fingerprints = Fingerprints({"a": (4, 4), "b": (4, 4)})
    a, b = fingerprints.patterns("a").ravel().copy(), fingerprints.patterns("b").ravel()
    assert fingerprints.recognise(a[:8]) is None
    assert fingerprints.recognise(np.concatenate([a, b])) is None
    a[-1] += 1
    assert fingerprints.recognise(a) is None


def test_more_parameters_than_fingerprints_are_refused() -> None:
    with pytest.raises(ExportError, match="fingerprints"):
        Fingerprints({"huge": (200_000_000,)})


# --- layout -----------------------------------------------------------------------------------------------------------


def test_every_blob_gets_its_source(fingerprints: Fingerprints, tmp_path: Path) -> None:
    blobs, literals = learn(bin_of(fingerprints), fingerprints, tmp_path)
    assert [(blob.kind, blob.name) for blob in blobs] == [
        ("literal", ""),
        ("parameter", "proj.weight"),
        ("parameter", "proj.bias"),
    ]
    assert np.frombuffer(literals, np.float32).tolist() == [0, -1e4, 0]
    assert layout.expected_shapes(blobs) == SHAPES
    assert not any(map(layout.is_transposed, blobs))


def test_transposed_weight_is_named(fingerprints: Fingerprints, tmp_path: Path) -> None:
    blobs, _ = learn(bin_of(fingerprints, axes=(1, 0)), fingerprints, tmp_path)
    assert [blob.name for blob in blobs if layout.is_transposed(blob)] == ["proj.weight"]


def test_zeros_that_a_layer_wants_are_kept_as_zeros(fingerprints: Fingerprints, tmp_path: Path) -> None:
    whole = Fingerprints({"proj.weight": SHAPES["proj.weight"]})
    mask = np.array([0, -1e4, 0], np.float32).view(np.uint32)
    blobs, _ = learn(words(mask, 0, whole.patterns("proj.weight"), 0, [0, 0]), whole, tmp_path)
    assert blobs[-1].kind == "zeros"


def test_dropped_parameter_is_refused(tmp_path: Path) -> None:
    more = Fingerprints({**SHAPES, "forgotten.weight": (2, 2)})
    with pytest.raises(ExportError, match=r"1 of 3 parameters are nowhere.*forgotten\.weight"):
        learn(bin_of(more), more, tmp_path)


def test_weight_that_is_no_whole_parameter_is_refused(fingerprints: Fingerprints, tmp_path: Path) -> None:
    data = bytearray(bin_of(fingerprints))
    data[20:24] = data[24:28]  # one element of proj.weight replaced by its neighbour
    with pytest.raises(ExportError, match=r"B of layer gemm_0 .*proj\.weight"):
        learn(bytes(data), fingerprints, tmp_path)


@pytest.mark.parametrize("change", [lambda data: data[:-4], lambda data: data + bytes(4)], ids=["cut", "longer"])
def test_bin_that_ends_elsewhere_is_refused(
    change: Callable[[bytes], bytes], fingerprints: Fingerprints, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"ends there|beyond the last layer"):
        learn(change(bin_of(fingerprints)), fingerprints, tmp_path)


# --- pnnx -------------------------------------------------------------------------------------------------------------


def test_log_that_tells_of_something_left_out_is_refused_despite_status_0() -> None:
    log = "############# pass_ncnn\nignore F.scaled_dot_product_attention sdpa_1 param is_causal=True\n"
    with pytest.raises(ExportError, match="is_causal=True"):
        pnnx.check_log(log, 0)
    pnnx.check_log("############# pass_ncnn\nFLOPS = 1G\n", 0)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (250, ToolCrashed, "status 250"),
        (-signal.SIGSEGV, ToolCrashed, "SIGSEGV"),
        (-signal.SIGKILL, NoRoom, "killed"),
    ],
)
def test_dead_pnnx_is_reported_with_its_last_lines(status: int, error: type[ModelError], message: str) -> None:
    with pytest.raises(error, match=rf"(?s){message}.*terminate called"):
        pnnx.check_log("terminate called after throwing\n", status)


def test_layer_that_ncnn_does_not_know_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.param"
    file.write_text(GRAPH.replace("BinaryOp ", "Tensor.to "))
    with pytest.raises(ExportError, match=r"Tensor\.to"):
        pnnx.check_layers(file)
    file.write_text(GRAPH)
    pnnx.check_layers(file)
