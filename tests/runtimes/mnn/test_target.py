"""The MNN target on the embedded demo checkpoint, against PyTorch."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from diffusette.checkpoints.families.sd1 import SD1
from diffusette.quantize.plan import Plan
from diffusette.runtimes.inputs import native_feeds
from diffusette.runtimes.mnn.mnn_file import MnnFile
from diffusette.runtimes.mnn.session import MnnSession
from diffusette.runtimes.mnn.target import MnnTarget
from diffusette.stages import extras
from diffusette.stages.artifacts import Checkpoint, TargetModel, TensorSpec
from diffusette.stages.errors import FeedError, MissingTool, ModelError

from ..workshop import SIZE, Array, snr_db
from ..workshop import Workshop as Shop

COMPONENTS: Final = tuple(SD1.components)  # of the demo
# Seen: 119 to 130 dB at both precisions. Float32 round-off; Winograd alone would bring the VAE to 71.
FLOOR_DB: Final = 100.0


class Workshop(Shop):
    """Of MNN."""

    def model(self, component: str, precision: str) -> TargetModel:
        return self.build(MnnTarget(), component, precision)

    def native(self, component: str) -> dict[str, Array]:
        inputs = self.model(component, "fp32").inputs
        return native_feeds(self.feeds(component), inputs, self.facts(component))


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Checkpoint) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("mnn"), demo_checkpoint.components)


def torch_output(module: Any, feeds: Mapping[str, Array], *, round_weights: bool) -> Array:
    """What PyTorch computes in float32, with weights (two dimensions and more) rounded to float16 or not."""
    import copy

    import torch

    module = copy.deepcopy(module)
    with torch.no_grad():
        for weight in module.parameters():
            if round_weights and weight.dim() >= 2:
                weight.copy_(weight.half().float())
        output: Array = module(*(torch.tensor(array) for array in feeds.values())).numpy()
    return output


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_model_computes_what_pytorch_computes_with_the_same_weights(
    workshop: Workshop, component: str, precision: str
) -> None:
    model = workshop.model(component, precision)
    reference = torch_output(workshop.module(component), workshop.feeds(component), round_weights=precision == "fp16")
    with MnnTarget().open(model, threads=2) as session:
        (output,) = session.run(workshop.native(component)).values()
    assert snr_db(reference, output) >= FLOOR_DB


@pytest.mark.parametrize("component", COMPONENTS)
def test_fp16_halves_the_file(workshop: Workshop, component: str) -> None:
    full, half = (
        (model.folder / model.files[0]).stat().st_size
        for model in (workshop.model(component, "fp32"), workshop.model(component, "fp16"))
    )
    assert half < 0.53 * full


@pytest.mark.parametrize("component", COMPONENTS)
def test_fp16_keeps_constants_that_are_not_weights_in_float32(workshop: Workshop, component: str) -> None:
    model = workshop.model(component, "fp16")
    halves = MnnFile(model.folder / model.files[0]).half_constants()
    assert not [name for name, values in halves.items() if values.size <= 128]


def test_the_unet_takes_a_ready_timestep_embedding(workshop: Workshop) -> None:
    names = {spec.name: spec for spec in workshop.model("unet", "fp32").inputs}
    assert sorted(names) == ["encoder_hidden_states", "sample", "timestep_embedding"]
    assert names["timestep_embedding"] == TensorSpec("timestep_embedding", "float32", (1, 48))


def test_the_text_encoder_takes_int32_ids(workshop: Workshop) -> None:
    assert workshop.model("text_encoder", "fp32").inputs == (TensorSpec("input_ids", "int32", (1, 77)),)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_same_component_gives_the_same_bytes_without_a_path_in_them(workshop: Workshop, precision: str) -> None:
    from diffusette.quantize.onnx_model import onnx_model
    from diffusette.runtimes.mnn.convert import BuildMnn

    first = workshop.model("vae_encoder", precision)
    onnx = onnx_model(workshop.sources["vae_encoder"], SIZE, Plan(precision), workshop.run)
    again = workshop.run_again(BuildMnn(onnx))
    content = (first.folder / first.files[0]).read_bytes()
    assert (again.folder / again.files[0]).read_bytes() == content
    for part in (str(workshop.root), str(Path.home()), "onnxsim", "diffusers"):
        assert part.encode() not in content


def test_models_with_other_weights_have_other_uuids(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("vae_encoder", "fp32")
    file = Path(shutil.copy(model.folder / model.files[0], tmp_path))
    before = MnnFile(file).stamp()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert MnnFile(file).stamp() != before


def test_results_do_not_change_when_the_model_runs_again(workshop: Workshop) -> None:
    feeds = workshop.native("vae_decoder")
    other = {name: array[..., ::-1].copy() for name, array in feeds.items()}
    with MnnTarget().open(workshop.model("vae_decoder", "fp32"), threads=1) as session:
        first = session.run(feeds)["sample"]
        kept = first.copy()
        assert not np.array_equal(session.run(other)["sample"], kept)
        assert np.array_equal(first, kept)
        assert np.array_equal(session.run(feeds)["sample"], kept)


def spoilt(feeds: dict[str, Array], name: str, how: str) -> dict[str, Array]:
    array = feeds[name]
    if how == "absent":
        return {key: value for key, value in feeds.items() if key != name}
    if how == "nan":
        array = array.copy()
        array.flat[0] = np.nan
    elif how == "shape":
        array = np.concatenate([array, array])
    elif how == "dtype":
        array = array.astype(np.float64)
    return {**feeds, name: array}


@pytest.mark.parametrize("how", ["absent", "nan", "shape", "dtype"])
@pytest.mark.parametrize("name", ["sample", "encoder_hidden_states", "timestep_embedding"])
def test_wrong_feeds_are_refused_before_native_code_sees_them(workshop: Workshop, name: str, how: str) -> None:
    feeds = workshop.native("unet")
    with MnnTarget().open(workshop.model("unet", "fp32"), threads=1) as session:
        with pytest.raises(FeedError, match=name):
            session.run(spoilt(feeds, name, how))
        assert np.isfinite(session.run(feeds)["out_sample"]).all()


def test_an_extra_feed_is_refused(workshop: Workshop) -> None:
    with MnnTarget().open(workshop.model("vae_encoder", "fp32"), threads=1) as session, pytest.raises(FeedError):
        session.run({**workshop.native("vae_encoder"), "timestep": np.array(1, np.float32)})


def test_int64_ids_are_refused(workshop: Workshop) -> None:
    model = workshop.model("text_encoder", "fp32")
    with MnnTarget().open(model, threads=1) as session, pytest.raises(FeedError, match="int64"):
        session.run(workshop.feeds("text_encoder"))


def test_a_model_of_another_size_than_its_bundle_says_is_refused(workshop: Workshop) -> None:
    model = workshop.model("vae_decoder", "fp32")
    larger = dataclasses.replace(model, inputs=(TensorSpec("latent_sample", "float32", (1, 4, 16, 16)),))
    with pytest.raises(ModelError, match="latent_sample"):
        MnnSession(larger, threads=1)


def test_a_closed_session_says_so(workshop: Workshop) -> None:
    session = MnnTarget().open(workshop.model("vae_encoder", "fp32"), threads=1)
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.run(workshop.native("vae_encoder"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    MnnTarget().require_build()
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(MissingTool, match="MNN") as caught:
        MnnTarget().require()
    assert caught.value.hint == "pip install 'diffusette[mnn]'"
