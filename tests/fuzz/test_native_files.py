"""Files that a native runtime would crash on: our own readers look first, and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flatbuffers
import hypothesis.strategies as st
import numpy as np
import pytest
from diffusette.runtimes.mnn.mnn_file import MnnFile
from diffusette.runtimes.ncnn.param import Layer, parse, render
from diffusette.runtimes.ncnn.session import check_files
from diffusette.stages.artifacts import TensorSpec
from hypothesis import example, given

from .guard import answer
from .hostile import cases, scratched

PARAM = """7767517
9 9
Input                    in0                      0 1 in0 0=8 1=8 2=4
MemoryData               table                    0 1 t0 0=4 1=2
Convolution              conv_0                   1 1 in0 1 0=8 1=3 5=1 6=288
GroupNorm                gn_0                     1 1 1 2 0=4 1=8 2=1e-05 3=1
InnerProduct             fc_0                     1 1 2 3 0=8 1=1 2=64
Gemm                     gemm_0                   1 1 3 4 4=1 5=1 6=1 7=2 8=3 9=4 10=4
MultiHeadAttention       mha_0                    1 1 4 5 0=8 1=2 2=64
Embed                    embed_0                  1 1 5 6 0=8 1=10 2=1 3=80
LayerNorm                ln_0                     1 1 6 out0 0=8 1=1e-05 2=1
"""
INPUTS = (TensorSpec("in0", "float32", (1, 4, 8, 8)),)
OUTPUTS = (TensorSpec("out0", "float32", (1, 8)),)
WORDS = st.sampled_from(
    ("", "0", "1", "-1", "9" * 5000, "-" + "9" * 4000, "0=" + "9" * 5000, "0=-1", "6=1e9", "6=x", "=", "a=b", "1=0",
     "-23330=4,1,2", "\0", "\u2028", "٣", "7767517", "Convolution", "MultiHeadAttention", "Gemm", "10=9", "2=-64")
)  # fmt: skip


def check(folder: Path) -> None:
    check_files(folder / "x.param", folder / "x.bin", INPUTS, OUTPUTS)


@st.composite
def reworded(draw: st.DrawFn) -> str:
    """The graph with some of its words replaced, removed or added."""
    lines = [line.split(" ") for line in PARAM.split("\n")]
    for _ in range(draw(st.integers(1, 4))):
        line = draw(st.sampled_from(lines))
        place = draw(st.integers(0, max(0, len(line) - 1)))
        line[place : place + draw(st.integers(0, 1))] = draw(st.lists(WORDS, max_size=2))
    return "\n".join(" ".join(line) for line in lines)


@cases(500)
@given(text=reworded(), weights=st.binary(max_size=64))
@example(text=PARAM, weights=b"")
@example(text="7767517\n99999999999 1\n", weights=b"")
@example(text="7767517\n" + "\n" * 10**6, weights=b"")
@example(text=PARAM.replace("0=8 1=2 2=64", "0=0 1=2 2=64"), weights=bytes(4096))
@example(text=PARAM.replace("6=288", "6=-288"), weights=bytes(4096))
def test_ncnn_graphs_of_any_words(text: str, weights: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.param").write_text(text)
    (tmp_path / "x.bin").write_bytes(weights)
    refusal = answer(lambda: check(tmp_path), tmp_path)
    assert refusal is not None or text.count("\n") > 2


@cases(200)
@given(content=scratched(PARAM.encode()))
def test_ncnn_graphs_of_any_bytes(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.param").write_bytes(content)
    (tmp_path / "x.bin").write_bytes(bytes(256))
    answer(lambda: check(tmp_path), tmp_path)


NAMES = st.text(
    st.characters(codec="ascii", exclude_characters="= \t\n\r\v\f\x1c\x1d\x1e\x1f\0"), min_size=1, max_size=9
)
LAYERS = st.builds(
    Layer,
    type=NAMES,
    name=NAMES,
    inputs=st.lists(NAMES, max_size=3).map(tuple),
    outputs=st.lists(NAMES, max_size=3).map(tuple),
    params=st.dictionaries(st.integers(0, 99), NAMES, max_size=3),
)


@cases(200)
@given(layers=st.lists(LAYERS, max_size=5))
def test_ncnn_graphs_are_read_as_they_are_written(layers: list[Layer]) -> None:
    assert parse(render(layers)) == tuple(layers)


def mnn_model(weights: bool) -> bytes:
    """A `.mnn` file as MNN lays it out: an input, a constant, a convolution whose weights lie in another file."""
    builder = flatbuffers.Builder(1024)

    def table(fields: dict[int, tuple[str, Any]], slots: int) -> int:
        builder.StartObject(slots)
        for slot, (kind, value) in fields.items():
            getattr(builder, f"Prepend{kind}Slot")(slot, value, 0)
        return int(builder.EndObject())

    def op(kind: int, name: str, main: int) -> int:
        text = builder.CreateString(name)
        return table({2: ("UOffsetTRelative", main), 3: ("UOffsetTRelative", text), 5: ("Int32", kind)}, 12)

    def vector(values: Any) -> tuple[str, int]:
        return "UOffsetTRelative", int(builder.CreateNumpyVector(values))

    dims = vector(np.array([1, 4, 8, 8], np.int32))
    sample = op(34, "sample", table({0: dims, 1: ("Int32", 1)}, 4))
    half = vector(np.arange(8, dtype=np.float16).view(np.uint8))
    shape = vector(np.array([8], np.int32))
    constant = op(11, "constant", table({0: shape, 2: ("Int32", 19), 3: half}, 10))
    place = vector(np.array([0, 64, 8], np.int64))
    convolution = op(12, "convolution", table({6: place} if weights else {}, 12))
    builder.StartVector(4, 3, 4)
    for each in (convolution, constant, sample):
        builder.PrependUOffsetTRelative(each)
    ops = builder.EndVector()
    name = builder.CreateString("out_sample")
    builder.StartVector(4, 1, 4)
    builder.PrependUOffsetTRelative(name)
    outputs = builder.EndVector()
    mark = builder.CreateString("00000000-0000-0000-0000-000000000000")
    net = {3: ("UOffsetTRelative", ops), 4: ("UOffsetTRelative", outputs), 11: ("UOffsetTRelative", mark)}
    builder.Finish(table(net, 12))
    return bytes(builder.Output())


def look(file: Path) -> MnnFile:
    model = MnnFile(file)
    model.check_weights()
    model.unconverted()
    model.half_constants()
    return model


@pytest.fixture
def mnn(tmp_path: Path) -> Path:
    file = tmp_path / "x.mnn"
    file.write_bytes(mnn_model(weights=True))
    file.with_name("x.mnn.weight").write_bytes(bytes(72))
    return file


def test_the_model_that_is_changed_below_is_whole(mnn: Path) -> None:
    model = look(mnn)
    assert model.inputs == (TensorSpec("sample", "float32", (1, 4, 8, 8)),)
    assert model.outputs == ("out_sample",)
    assert model.weight_bytes == 72
    assert list(model.half_constants()["constant"]) == list(range(8))


def test_mnn_models_with_every_byte_changed(mnn: Path) -> None:
    whole = mnn.read_bytes()
    for place in range(len(whole)):
        for byte in (0, 1, 0x7F, 0x80, 0xFF, whole[place] ^ 1):
            mnn.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            answer(lambda: look(mnn), mnn.parent)


def test_mnn_models_cut_at_every_length(mnn: Path) -> None:
    whole = mnn.read_bytes()
    for length in range(len(whole)):
        mnn.write_bytes(whole[:length])
        answer(lambda: look(mnn), mnn.parent)


@cases(500)
@given(content=scratched(mnn_model(weights=True)))
def test_mnn_models_of_any_bytes(content: bytes, mnn: Path) -> None:
    mnn.write_bytes(content)
    answer(lambda: look(mnn), mnn.parent)


def test_an_mnn_model_cannot_blow_itself_up(mnn: Path) -> None:
    """A million operators in four megabytes, each of which has the same name of four megabytes: 16 TB of names."""
    builder = flatbuffers.Builder(2**23)
    name = builder.CreateString("n" * 2**22)
    builder.StartObject(12)
    builder.PrependUOffsetTRelativeSlot(3, name, 0)
    builder.PrependInt32Slot(5, 11, 0)
    op = builder.EndObject()
    builder.StartVector(4, 2**20, 4)
    for _ in range(2**20):
        builder.PrependUOffsetTRelative(op)
    ops = builder.EndVector()
    builder.StartObject(12)
    builder.PrependUOffsetTRelativeSlot(3, ops, 0)
    builder.Finish(builder.EndObject())
    mnn.write_bytes(bytes(builder.Output()))
    assert answer(lambda: look(mnn), mnn.parent) is not None
