"""Single files of the original code, written by `tests.ldm` in the real key layout, open as what they were."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusette.export.checkpoint import DEMO_FOLDER, open_checkpoint
from diffusette.export.modules import load
from diffusette.export.single_file.open import read_single_file
from diffusette.export.single_file.tokenizer import CLIP, OPEN_CLIP
from diffusette.export.weights import Weights
from diffusette.pipeline.artifacts import Checkpoint, Companions
from diffusette.pipeline.errors import CheckpointError, UsageError

from ..ldm import Tensors, ldm_tensors, ldm_vae, original_pipeline, with_ema, write_ldm

TOKENIZER = DEMO_FOLDER / "tokenizer"
GIVEN = Companions(tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return original_pipeline("sd1")


@pytest.fixture(scope="module")
def tensors(pipeline: Any) -> Tensors:
    return ldm_tensors(pipeline)


@pytest.fixture(scope="module")
def file(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ldm(tmp_path_factory.mktemp("single") / "model.safetensors", tensors)


def refusal(file: Path, given: Companions = GIVEN) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(file, companions=given, survey=False)
    return caught.value


def assert_weights_are(checkpoint: Checkpoint, pipeline: Any, cast: torch.dtype = torch.float32) -> None:
    """Every weight of every component equals the module's that the file was written from."""
    for name, source in checkpoint.components.items():
        module = pipeline.vae if name.startswith("vae") else getattr(pipeline, name)
        state = {n.removeprefix("text_model."): v for n, v in module.state_dict().items()}
        weights = Weights(source)
        assert weights.names()
        for tensor in weights.names():
            expected = state[tensor.removeprefix("text_model.")].to(cast).float().numpy()
            np.testing.assert_array_equal(weights.read(tensor).astype(np.float32), expected, err_msg=tensor)
        half = {"vae_decoder": ("decoder.", "post_quant"), "vae_encoder": ("encoder.", "quant")}.get(name, ("",))
        # SDXL reads its encoders' states before the last layer, which the first one then needs not hold
        found = {n.removeprefix("text_model.") for n in (*weights.names(), *weights.unused())}
        assert found == {n for n in state if n.startswith(half)}


def test_every_weight_of_an_sd1_file_is_found_under_todays_name(file: Path, pipeline: Any) -> None:
    found = open_checkpoint(file, companions=GIVEN)
    assert (found.family, found.name) == ("sd1", "model")
    assert_weights_are(found, pipeline)


def test_derived_configurations_build_the_modules_that_the_weights_fit(file: Path) -> None:

    for source in open_checkpoint(file, companions=GIVEN, survey=False).components.values():
        load(source)  # checks every name and shape against the module


def test_derived_configurations_are_those_of_the_module_that_was_saved(file: Path, pipeline: Any) -> None:
    components = open_checkpoint(file, companions=GIVEN, survey=False).components
    for name, module in (("unet", pipeline.unet), ("vae_decoder", pipeline.vae)):
        for key, value in components[name].config.items():
            if key not in ("_class_name", "sample_size"):
                stated = module.config[key]
                assert value == (list(stated) if isinstance(stated, tuple) else stated), key
    for key, value in components["text_encoder"].config.items():
        if key != "architectures":
            assert value == getattr(pipeline.text_encoder.config, key), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_as_stored(dtype: torch.dtype, pipeline: Any, tmp_path: Path) -> None:
    file = write_ldm(tmp_path / "half.safetensors", ldm_tensors(pipeline), dtype)
    found = open_checkpoint(file, companions=GIVEN)
    assert {part.dtype for part in found.components.values()} == {str(dtype).removeprefix("torch.")}
    assert_weights_are(found, pipeline, dtype)


def test_averaged_weights_are_left_out_unless_asked_for(tensors: Tensors, pipeline: Any, tmp_path: Path) -> None:
    file = write_ldm(tmp_path / "ema.safetensors", with_ema(tensors, lambda values: values + 1))
    plain = open_checkpoint(file, companions=GIVEN)
    averaged = open_checkpoint(file, companions=Companions(tokenizer=TOKENIZER, ema=True))
    assert_weights_are(plain, pipeline)
    name = "conv_in.weight"
    unets = [Weights(each.components["unet"]).read(name) for each in (plain, averaged)]
    np.testing.assert_array_equal(unets[1], unets[0] + 1)
    assert any("(EMA) are left out" in remark for remark in plain.remarks)
    assert plain.components["text_encoder"].digest == averaged.components["text_encoder"].digest
    assert plain.components["unet"].digest != averaged.components["unet"].digest


def test_averaged_weights_that_are_not_there_are_not_invented(file: Path) -> None:
    assert "no averaged weights" in refusal(file, Companions(tokenizer=TOKENIZER, ema=True)).what


def test_what_is_assumed_is_said(file: Path) -> None:
    said = " ".join(open_checkpoint(file, companions=GIVEN, survey=False).remarks)
    for words in ("8 attention heads", "VAE scaling 0.18215", "prediction epsilon (assumed", "512 pixels"):
        assert words in said


def test_widths_that_the_original_code_cannot_have_need_configurations(pipeline: Any, tmp_path: Path) -> None:
    odd = {name: values[: len(values) - 8] if ".out_layers.3." in name else values
           for name, values in ldm_tensors(pipeline).items()}  # fmt: skip
    problem = refusal(write_ldm(tmp_path / "odd.safetensors", odd))
    assert "do not divide into" in problem.what
    assert "--config" in problem.hint


# --- what the file does not say


def test_a_yaml_beside_the_file_states_prediction_factor_and_heads(tensors: Tensors, tmp_path: Path) -> None:
    file = write_ldm(tmp_path / "v.safetensors", tensors)
    (tmp_path / "v.yaml").write_text(
        "model:\n  params:\n    parameterization: v\n    scale_factor: 0.5\n    linear_start: 0.001\n"
        "    linear_end: 0.01\n    unet_config: {params: {num_heads: 4}}\n"
    )
    found = read_single_file(file, GIVEN)
    configs = found.headers.configs
    assert configs["scheduler"]["prediction_type"] == "v_prediction"
    assert (configs["scheduler"]["beta_start"], configs["scheduler"]["beta_end"]) == (0.001, 0.01)
    assert configs["vae"]["scaling_factor"] == 0.5
    assert configs["unet"]["attention_head_dim"] == 4
    assert any("v.yaml" in remark for remark in found.remarks)


@pytest.mark.parametrize(
    ("metadata", "markers", "given", "prediction", "says"),
    [
        ({"modelspec.prediction_type": "v"}, (), None, "v_prediction", "modelspec"),
        ({"modelspec.prediction_type": "epsilon"}, (), None, "epsilon", "modelspec"),
        ({}, ("v_pred",), None, "v_prediction", "marker"),
        ({"modelspec.prediction_type": "epsilon"}, (), "v_prediction", "v_prediction", "--prediction"),
    ],
)
def test_prediction_is_told_by_evidence(
    metadata: dict[str, str], markers: tuple[str, ...], given: str | None, prediction: str, says: str,
    tensors: Tensors, tmp_path: Path,
) -> None:  # fmt: skip
    file = write_ldm(tmp_path / "m.safetensors", tensors | dict.fromkeys(markers, torch.zeros(1)), metadata=metadata)
    found = read_single_file(file, Companions(tokenizer=TOKENIZER, prediction=given))
    assert found.headers.configs["scheduler"]["prediction_type"] == prediction
    assert any(says in remark for remark in found.remarks)


def test_a_prediction_that_does_not_exist_is_refused(file: Path) -> None:
    with pytest.raises(UsageError, match="epsilonn"):
        open_checkpoint(file, companions=Companions(tokenizer=TOKENIZER, prediction="epsilonn"), survey=False)


def test_clips_vocabulary_is_shipped(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    file = write_ldm(tmp_path / "clip.safetensors", ldm_tensors(original_pipeline("sd1", vocabulary=49408)))
    found = open_checkpoint(file, survey=False)
    assert found.tokenizer == CLIP
    ids = CLIPTokenizer.from_pretrained(found.tokenizer)("a photo of an astronaut riding a horse").input_ids
    # as openai/CLIP's own tokenizer gives them
    assert ids == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 49407]


def test_a_vocabulary_of_its_own_needs_its_tokenizer(file: Path, tmp_path: Path) -> None:
    problem = refusal(file, Companions())
    assert "knows 681 tokens" in problem.what
    assert "--tokenizer" in problem.hint
    assert "49408 tokens, the text encoder knows 681" in refusal(file, Companions(tokenizer=CLIP)).what
    shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    shutil.copy(file, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path / "model.safetensors", survey=False).tokenizer == tmp_path / "tokenizer"


def test_configurations_of_a_diffusers_folder_can_be_given(file: Path, tmp_path: Path) -> None:
    shutil.copytree(DEMO_FOLDER, tmp_path / "demo", ignore=shutil.ignore_patterns("*.safetensors"))
    found = open_checkpoint(file, companions=Companions(config=tmp_path / "demo"), survey=False)
    assert found.components["vae_decoder"].config["scaling_factor"] == 0.40502


# --- provenance and digests


def test_sources_hold_no_path_of_this_machine(file: Path) -> None:
    found = open_checkpoint(file, companions=GIVEN)
    assert set(found.sources) == {"model.safetensors"} | {f"tokenizer/{f.name}" for f in TOKENIZER.iterdir()}
    assert all(len(digest) == 64 for digest in found.sources.values())


def test_equal_content_has_one_digest_in_any_file(file: Path, tensors: Tensors, tmp_path: Path) -> None:
    changed = dict(tensors)
    name = "model.diffusion_model.out.2.bias"
    changed[name] = changed[name] + 1
    one = open_checkpoint(file, companions=GIVEN)
    other = open_checkpoint(write_ldm(tmp_path / "fine-tune.safetensors", changed), companions=GIVEN)
    same = {part for part in one.components if one.components[part].digest == other.components[part].digest}
    assert same == {"text_encoder", "vae_decoder", "vae_encoder"}
    assert one.digest != other.digest


# --- SD 2.x and SDXL


@pytest.mark.parametrize(("kind", "dtype"), [("sd2", torch.float32), ("sdxl", torch.float32), ("sdxl", torch.float16)])
def test_every_weight_of_sd2_and_sdxl_files_is_found_under_todays_name(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    pipeline = original_pipeline(kind)
    file = write_ldm(tmp_path / "model.safetensors", ldm_tensors(pipeline), dtype)
    found = open_checkpoint(file, companions=Companions(tokenizer=TOKENIZER, prediction="v_prediction"))
    assert found.family == kind
    assert ("text_encoder_2" in found.components) == (kind == "sdxl")
    assert_weights_are(found, pipeline, dtype)
    factor = found.components["vae_decoder"].config["scaling_factor"]
    assert factor == {"sd2": 0.18215, "sdxl": 0.13025}[kind]
    if dtype == torch.float32:
        for source in found.components.values():
            load(source)  # checks every name and shape against the module that the derived configuration builds


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_derived_configurations_of_sd2_and_sdxl_are_those_of_the_modules(kind: str, tmp_path: Path) -> None:
    pipeline = original_pipeline(kind)
    file = write_ldm(tmp_path / "model.safetensors", ldm_tensors(pipeline))
    layout = read_single_file(file, Companions(tokenizer=TOKENIZER, prediction="v_prediction"))
    for part in layout.weights:
        module = getattr(pipeline, part)
        for key, value in layout.headers.configs[part].items():
            if key not in ("_class_name", "sample_size", "architectures", "scaling_factor"):
                stated = module.config.to_dict()[key] if part.startswith("text") else module.config[key]
                assert value == (list(stated) if isinstance(stated, tuple) else stated), (part, key)


def test_open_clips_tokenizer_fills_with_token_0() -> None:
    from transformers import CLIPTokenizer

    own, open_clip = (CLIPTokenizer.from_pretrained(folder) for folder in (CLIP, OPEN_CLIP))
    assert (own.pad_token_id, open_clip.pad_token_id) == (49407, 0)
    assert own("a red star").input_ids == open_clip("a red star").input_ids


def test_an_sd2_file_that_does_not_say_what_it_predicts_asks(tmp_path: Path) -> None:
    tensors = ldm_tensors(original_pipeline("sd2"))
    file = write_ldm(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match="nothing in this file says which") as caught:
        read_single_file(file, GIVEN)
    assert "--prediction" in caught.value.hint
    stated = write_ldm(tmp_path / "v.safetensors", tensors, metadata={"modelspec.prediction_type": "v"})
    layout = read_single_file(stated, GIVEN)
    assert layout.headers.configs["scheduler"]["prediction_type"] == "v_prediction"
    assert layout.headers.configs["unet"]["sample_size"] == 96  # 768 pixels


def test_the_refiner_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {
        "model.diffusion_model.out.2.bias": torch.zeros(4),
        "conditioner.embedders.0.model.ln_final.bias": torch.zeros(4),
    }
    assert "the refiner" in refusal(write_ldm(tmp_path / "refiner.safetensors", tensors)).what


# --- a VAE apart


def test_a_vae_apart_replaces_the_one_in_the_file(file: Path, pipeline: Any, tmp_path: Path) -> None:
    other = original_pipeline("sd1").vae
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.25)
    original = write_ldm(tmp_path / "vae-ldm.safetensors", ldm_vae(other, prefix=""))
    other.save_pretrained(tmp_path / "vae")
    places = (original, tmp_path / "vae", tmp_path / "vae/diffusion_pytorch_model.safetensors")
    for place in places:
        found = open_checkpoint(file, companions=Companions(tokenizer=TOKENIZER, vae=place))
        weights = Weights(found.components["vae_decoder"])
        for name in weights.names():
            np.testing.assert_array_equal(weights.read(name), other.state_dict()[name].numpy())
        assert {label for label in found.sources if label.startswith("vae/")}
        np.testing.assert_array_equal(
            Weights(found.components["unet"]).read("conv_in.bias"), pipeline.unet.conv_in.bias.detach()
        )


def test_a_file_without_vae_asks_for_one(tensors: Tensors, file: Path, tmp_path: Path) -> None:
    bare = {name: values for name, values in tensors.items() if not name.startswith("first_stage_model.")}
    small = write_ldm(tmp_path / "bare.safetensors", bare)
    problem = refusal(small)
    assert "without a VAE" in problem.what
    assert "--vae" in problem.hint
    with_vae = open_checkpoint(small, companions=Companions(tokenizer=TOKENIZER, vae=file))
    assert with_vae.components["vae_decoder"].config["scaling_factor"] == 0.18215


def test_a_vae_that_is_none_is_refused(file: Path, tmp_path: Path) -> None:
    wrong = write_ldm(tmp_path / "x.safetensors", {"x": torch.zeros(1)})
    assert "no tensor of a VAE" in refusal(file, Companions(tokenizer=TOKENIZER, vae=wrong)).what
    assert "no such file" in refusal(file, Companions(tokenizer=TOKENIZER, vae=tmp_path / "gone")).what


def test_a_vae_apart_serves_a_diffusers_folder_too(tiny_copy: Path, tmp_path: Path) -> None:
    shutil.move(tiny_copy / "vae", tmp_path / "other")
    found = open_checkpoint(tiny_copy, companions=Companions(vae=tmp_path / "other"))
    assert "vae/config.json" in found.sources


# --- refusals


def test_damage_is_refused_within_seconds(file: Path, tensors: Tensors, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    missing = write_ldm(tmp_path / "missing.safetensors", {n: v for n, v in tensors.items() if ".out.2." not in n})
    encoderless = write_ldm(
        tmp_path / "unet.safetensors", {n: v for n, v in tensors.items() if not n.startswith("cond_stage_model.")}
    )
    started = time.perf_counter()
    assert "weights end at byte" in refusal(cut).what
    assert "out.2.weight" in refusal(missing).what
    assert "without its text encoder" in refusal(encoderless).what
    assert time.perf_counter() - started < 5
    extra = tensors | {"model.diffusion_model.input_blocks.1.7.weight": torch.zeros(4)}
    assert "have no place in diffusers' model" in refusal(write_ldm(tmp_path / "extra.safetensors", extra)).what


def test_the_demos_twin_is_known_by_its_text_encoder(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    class Twin:
        unet = UNet2DConditionModel.from_pretrained(DEMO_FOLDER / "unet")
        vae = AutoencoderKL.from_pretrained(DEMO_FOLDER / "vae")
        text_encoder = CLIPTextModel.from_pretrained(DEMO_FOLDER / "text_encoder")

    demo = open_checkpoint("demo")
    twin = open_checkpoint(write_ldm(tmp_path / "twin.safetensors", ldm_tensors(Twin)))
    assert {n: part.digest for n, part in twin.components.items()} == {
        n: part.digest for n, part in demo.components.items()
    }
    assert twin.digest == demo.digest
