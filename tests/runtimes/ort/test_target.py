"""The ONNX Runtime target on the embedded demo checkpoint, against PyTorch."""

from __future__ import annotations

import dataclasses
import shutil
import struct
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from diffusette.checkpoints.families.sd1 import SD1
from diffusette.runtimes.ort import mobile, ort_file, session
from diffusette.runtimes.ort.build import BuildOrt
from diffusette.runtimes.ort.external_data import read_graph
from diffusette.runtimes.ort.loose_weights import put_weights_back, take_weights_out
from diffusette.runtimes.ort.ort_file import schema
from diffusette.runtimes.ort.session import OrtSession
from diffusette.runtimes.ort.target import OrtTarget
from diffusette.stages.artifacts import Checkpoint, TargetModel
from diffusette.stages.errors import BundleError, FeedError, ModelError, RecipeError, ToolCrashed
from diffusette.stages.onnx_file import read_onnx
from onnx import TensorProto

from ..workshop import Array, Workshop, snr_db

# Seen: 121 to 136 dB at fp32, 118 to 128 dB at fp16 against PyTorch with the same rounded weights.
COMPONENTS: Final = tuple(SD1.components)  # of the demo
SUMMATION_DB: Final = 100.0
SAME_WEIGHTS_DB: Final = 90.0
# Seen: 60 to 73 dB. What rounding the weights costs.
HALF_DB: Final = 45.0


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Checkpoint) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("ort"), demo_checkpoint.components)


def built(shop: Workshop, component: str, precision: str = "fp32", form: str = "onnx") -> TargetModel:
    model = shop.build(OrtTarget(), component, precision)
    return model if form == "onnx" else dataclasses.replace(model, files=model.forms[form])


def result(model: TargetModel, feeds: dict[str, Array]) -> Array:
    with OrtSession(model, threads=1) as opened:
        (output,) = opened.run(feeds).values()
    return output


@pytest.fixture
def copy(shop: Workshop, tmp_path: Path) -> TargetModel:
    """The text encoder's model in a folder that a test may damage."""
    model = built(shop, "text_encoder")
    return dataclasses.replace(model, folder=Path(shutil.copytree(model.folder, tmp_path / "copy")))


# -- parity


@pytest.mark.parametrize("form", ["onnx", "ort"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_fp32_computes_what_pytorch_computes(component: str, form: str, shop: Workshop) -> None:
    output = result(built(shop, component, "fp32", form), shop.feeds(component))
    assert snr_db(shop.reference(component), output) >= SUMMATION_DB


@pytest.mark.parametrize("form", ["onnx", "ort"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_fp16_only_rounds_the_weights(component: str, form: str, shop: Workshop) -> None:
    output = result(built(shop, component, "fp16", form), shop.feeds(component))
    assert output.dtype == np.float32
    assert snr_db(shop.reference(component), output) >= HALF_DB
    assert snr_db(shop.reference(component, "float16"), output) >= SAME_WEIGHTS_DB


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_onnx_form_takes_any_batch(component: str, shop: Workshop) -> None:
    import onnxruntime

    file = built(shop, component).folder / component / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    opened = onnxruntime.InferenceSession(file, options)
    first, second = shop.feeds(component, seed=1), shop.feeds(component, seed=2)
    both = {name: np.concatenate([a, second[name]]) if a.ndim else a for name, a in first.items()}
    (together,) = opened.run(None, both)
    for row, feeds in enumerate((first, second)):
        assert snr_db(opened.run(None, feeds)[0], together[row : row + 1]) >= 120  # other blocks in the same sums


def test_large_fp16_weights_are_not_widened_when_loaded(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    model, feeds = built(shop, "unet", "fp16"), shop.feeds("unet")
    narrow = session._too_large_to_widen
    graph = read_onnx(model.folder / model.files[0])
    assert not narrow(graph)
    widened = result(model, feeds)
    monkeypatch.setattr(session, "WIDEN_AT_MOST", 2**20)
    assert narrow(graph)
    assert snr_db(widened, result(model, feeds)) >= SUMMATION_DB


# -- files


def test_the_layout_is_that_of_optimum(shop: Workshop) -> None:
    model = built(shop, "unet", "fp16")
    assert model.files == ("unet/model.onnx", "unet/model.onnx_data")
    assert model.forms == {"ort": ("unet/model.ort", "unet/required_operators.config")}
    assert sorted(p.name for p in (model.folder / "unet").iterdir()) == [
        "model.onnx", "model.onnx_data", "model.ort", "required_operators.config",
    ]  # fmt: skip


@pytest.mark.parametrize("component", COMPONENTS)
def test_fp16_halves_every_file(component: str, shop: Workshop) -> None:
    wide, narrow = built(shop, component, "fp32"), built(shop, component, "fp16")
    for name in ("model.onnx_data", "model.ort"):
        sizes = [(model.folder / component / name).stat().st_size for model in (wide, narrow)]
        assert sizes[1] < 0.57 * sizes[0], name
    assert wide.bits_per_weight == 32
    assert 16 < narrow.bits_per_weight < 16.3


def test_the_list_of_operators_names_those_of_the_model_and_no_path(shop: Workshop) -> None:
    model = built(shop, "unet", "fp16")
    lines = (model.folder / "unet" / "required_operators.config").read_text().splitlines()
    assert lines[0] == "# operators of model.ort"
    rows = [line.split(";") for line in lines[1:]]
    operators = {name for _, _, names in rows for name in names.split(",")}
    assert {domain for domain, _, _ in rows} <= {"ai.onnx", "com.microsoft"}
    assert {"Conv", "Cast", "InstanceNormalization", "Softmax"} <= operators
    assert str(shop.root) not in "".join(lines)


def test_equal_inputs_give_equal_bytes(shop: Workshop, tmp_path: Path) -> None:
    model = built(shop, "vae_decoder", "fp16")
    again = BuildOrt(shop.canonical("vae_decoder", "fp16")).run(tmp_path)
    for file in (*again.files, *again.forms["ort"]):
        assert (tmp_path / file).read_bytes() == (model.folder / file).read_bytes(), file


def test_a_model_too_large_for_the_ort_form_keeps_onnx_and_says_so(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mobile, "MAX_BYTES", 10 * 2**20)
    unet = shop.canonical("unet", "fp32")
    for number, forms in enumerate([("onnx", "ort"), ("ort", "onnx"), ("ort",)]):
        into = tmp_path / str(number)
        into.mkdir()
        model = BuildOrt(unet, forms).run(into)
        assert model.files == ("unet/model.onnx", "unet/model.onnx_data")
        assert model.forms == {}
        assert model.notes == (
            "no .ort form: the format holds 10.0 MiB, this model is 13.1 MiB; use its .onnx form, or fewer bits",
        )
        assert not (into / "unet" / "model.ort").exists()


def test_a_widened_ort_form_is_an_error(shop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mobile, "_DISABLED", [])
    monkeypatch.setattr(mobile, "take_weights_out", lambda model: ())  # what is no constant cannot be folded
    with pytest.raises(ModelError, match="precision changed"):
        BuildOrt(shop.canonical("text_encoder", "fp16")).run(tmp_path)


def test_a_file_written_without_its_weights_is_the_one_that_onnx_runtime_writes_with_them(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = built(shop, "text_encoder", "fp16", "ort")
    monkeypatch.setattr(mobile, "take_weights_out", lambda model: ())
    theirs = BuildOrt(shop.canonical("text_encoder", "fp16"), ("ort",)).run(tmp_path)
    assert parts(own.folder / own.files[0]) == parts(theirs.folder / theirs.files[0])


def test_where_the_model_begins_does_not_depend_on_how_the_kernels_lay(shop: Workshop, tmp_path: Path) -> None:
    """Seen in one conversion of a hundred: ONNX Runtime's own front was eight bytes longer, and so was our file."""
    own = built(shop, "text_encoder", "fp32", "ort")
    file = own.folder / own.files[0]
    content = file.read_bytes()
    version, kernels, model = ort_file._read(content)
    start = min(model, model - struct.unpack_from("<i", content, model)[0])
    for more in (8, 24, 64):
        longer = ort_file._front(version, kernels, model + more).ljust(start + more, b"\0")
        (tmp_path / f"{more}.ort").write_bytes(longer + content[start:])
        ort_file.put_in_order(tmp_path / f"{more}.ort", tmp_path / f"{more} in order.ort")
        assert (tmp_path / f"{more} in order.ort").read_bytes() == content
    assert len(content) % 64 == 0


def parts(file: Path) -> tuple[object, ...]:
    """Nodes in their order, initializers by name, inputs and outputs of a `.ort` file."""
    graph = schema("InferenceSession").InferenceSession.GetRootAs(file.read_bytes(), 0).Model().Graph()
    nodes = [graph.Nodes(place) for place in range(graph.NodesLength())]
    tensors = [graph.Initializers(place) for place in range(graph.InitializersLength())]
    return (
        [
            (n.OpType(), n.Name(), *map(n.Inputs, range(n.InputsLength())), *map(n.Outputs, range(n.OutputsLength())))
            for n in nodes
        ],
        {t.Name(): (t.DataType(), t.DimsAsNumpy().tolist(), t.RawDataAsNumpy().tobytes()) for t in tensors},
        [graph.Inputs(place) for place in range(graph.InputsLength())],
        [graph.Outputs(place) for place in range(graph.OutputsLength())],
    )


def test_a_hollow_graph_holds_no_large_weight_and_its_file_refuses_others(shop: Workshop, tmp_path: Path) -> None:
    source = shop.canonical("text_encoder", "fp16")
    model = read_graph(source.file)
    weights = take_weights_out(model)
    assert sum(weight.bytes for weight in weights) > 0.95 * (source.folder / weights[0].file).stat().st_size
    left = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert {tensor.data_type for tensor in left} <= {TensorProto.FLOAT}  # biases and norms
    other = dataclasses.replace(weights[0], name="another")
    file = Path(shutil.copy(built(shop, "text_encoder", "fp16").folder / "text_encoder" / "model.ort", tmp_path))
    with pytest.raises(ModelError, match="dropped a weight"):
        put_weights_back(file, [other], source.folder)


def test_the_form_named_first_is_the_one_that_is_loaded(shop: Workshop, tmp_path: Path) -> None:
    model = BuildOrt(shop.canonical("text_encoder", "fp16"), ("ort",)).run(tmp_path)
    assert model.files[0] == "text_encoder/model.ort"
    assert model.forms == {}
    assert snr_db(shop.reference("text_encoder", "float16"), result(model, shop.feeds("text_encoder"))) >= 90


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(RecipeError, match="'otr'"):
        OrtTarget(forms=("onnx", "otr"))


# -- a session


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda f: {**f, "sample": f["sample"].astype(np.float64)}, id="dtype"),
        pytest.param(lambda f: {**f, "sample": f["sample"][:, :, :4]}, id="shape"),
        pytest.param(lambda f: {**f, "sample": np.concatenate([f["sample"]] * 2)}, id="batch of two"),
        pytest.param(lambda f: {**f, "samples": f["sample"]}, id="unknown name"),
        pytest.param(lambda f: {k: v for k, v in f.items() if k != "timestep"}, id="missing name"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(change: Any, shop: Workshop) -> None:
    with OrtSession(built(shop, "unet"), threads=1) as opened, pytest.raises(FeedError):
        opened.run(change(shop.feeds("unet")))


def test_a_closed_session_says_so(shop: Workshop) -> None:
    opened = OrtSession(built(shop, "text_encoder"), threads=1)
    opened.close()
    opened.close()
    with pytest.raises(ToolCrashed, match="closed"):
        opened.run(shop.feeds("text_encoder"))


@pytest.mark.parametrize("file", ["model.onnx", "model.ort"])
@pytest.mark.parametrize("damage", [b"", b"garbage" * 100, None], ids=["empty", "garbage", "cut"])
def test_a_damaged_file_is_reported_not_loaded(file: str, damage: bytes | None, copy: TargetModel) -> None:
    path = copy.folder / "text_encoder" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage is None else damage)
    model = dataclasses.replace(copy, files=(f"text_encoder/{file}",))
    with pytest.raises(BundleError, match=file):
        OrtSession(model, threads=1)


def test_a_model_with_other_inputs_than_promised_is_refused(copy: TargetModel) -> None:
    renamed = dataclasses.replace(copy.inputs[0], name="ids")
    with pytest.raises(BundleError, match=r"its inputs are input_ids int64\[1, 77\], the manifest says ids"):
        OrtSession(dataclasses.replace(copy, inputs=(renamed,)), threads=1)


# -- external data


def edit_places(model: TargetModel, **entries: str) -> None:
    """Rewrite the external-data entries of the first weight that has some."""
    import onnx

    file = model.folder / model.files[0]
    graph = onnx.load(str(file), load_external_data=False)
    tensor = next(t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    for entry in tensor.external_data:
        entry.value = entries.get(entry.key, entry.value)
    onnx.save(graph, str(file))


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"location": "../model.onnx_data"}, "not a file of the same folder"),
        ({"location": "/etc/passwd"}, "not a file of the same folder"),
        ({"location": "other"}, "missing"),
        ({"location": ""}, "not a file of the same folder"),
        ({"offset": "99999999"}, "end at byte"),
        ({"offset": "-4096"}, "end at byte"),
        ({"offset": "much"}, "not in numbers"),
        ({"length": "4"}, "bytes, the graph says 4"),
    ],
)
def test_external_data_must_lie_inside_the_folder_and_be_long_enough(
    entries: dict[str, str], why: str, copy: TargetModel
) -> None:
    if "location" in entries:
        shutil.copyfile(copy.folder / copy.files[1], copy.folder / "model.onnx_data")
    edit_places(copy, **entries)
    with pytest.raises(BundleError, match=why):
        OrtSession(copy, threads=1)


def test_external_data_must_not_be_a_link(copy: TargetModel) -> None:
    data = copy.folder / copy.files[1]
    data.rename(copy.folder / "elsewhere")
    data.symlink_to(copy.folder / "elsewhere")
    with pytest.raises(BundleError, match="a link"):
        OrtSession(copy, threads=1)


def test_cut_external_data_is_reported(copy: TargetModel) -> None:
    data = copy.folder / copy.files[1]
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(BundleError, match=f"has {data.stat().st_size}"):
        OrtSession(copy, threads=1)
