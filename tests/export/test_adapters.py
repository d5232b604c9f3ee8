"""Adapters merged before export do what they do live in PyTorch, whoever wrote their file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusette.export.adapters.movement import MeasureMovement
from diffusette.export.checkpoint import DEMO_FOLDER, open_checkpoint
from diffusette.export.modules import load
from diffusette.export.weights import Weights
from diffusette.pipeline.artifacts import Checkpoint, Companions
from diffusette.pipeline.errors import CheckpointError
from safetensors.torch import save_file

from ..adapters import ATTENTION, CONFIGS, WITH_CONVOLUTIONS, adapt, random_lora, save_peft
from ..ldm import ldm_tensors, original_pipeline, unet_name, write_ldm

FLOOR_DB = 100.0  # float32 sums in another order; a wrong scale or a missed module is below 40


def snr_db(reference: torch.Tensor, found: torch.Tensor) -> float:
    noise = float(((reference - found).double() ** 2).sum())
    return 10 * float(np.log10(float((reference.double() ** 2).sum()) / noise)) if noise else float("inf")


def feeds(unet: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = unet.config.cross_attention_dim
    return (
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.tensor(501.0),
        torch.randn(1, 77, width, generator=generator),
    )


def opened(folder: Path, *adapters: tuple[Path, float]) -> Checkpoint:
    return open_checkpoint(folder, companions=Companions(adapters=adapters), survey=False)


def live_and_merged(folder: Path, adapters: tuple[tuple[Path, float], ...], unet: Any) -> float:
    """Decibels between the live `unet` and the one that `folder` with `adapters` loads as."""
    inputs = feeds(unet)
    with torch.no_grad():
        live = unet.eval()(*inputs, return_dict=False)[0]
        merged = load(opened(folder, *adapters).components["unet"])(*inputs)
        plain = load(opened(folder).components["unet"])(*inputs)
    assert snr_db(live, plain) < 40, "the adapter must matter, or the comparison proves nothing"
    return snr_db(live, merged)


@pytest.fixture
def unet(tiny_folder: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(tiny_folder / "unet")


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_merged_peft_adapter_is_the_live_one(kind: str, unet: Any, tiny_folder: Path, tmp_path: Path) -> None:
    live = adapt(unet, kind)
    place = save_peft(live, kind, tmp_path / kind)
    assert live_and_merged(tiny_folder, ((place, 1.0),), live) > FLOOR_DB


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_a_scale_is_the_one_that_peft_sets(kind: str, unet: Any, tiny_folder: Path, tmp_path: Path) -> None:
    live = adapt(unet, kind)
    place = save_peft(live, kind, tmp_path / kind)
    for module in live.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.4)
    assert live_and_merged(tiny_folder, ((place, 0.4),), live) > FLOOR_DB


def with_diffusers(folder: Path, *states: tuple[dict[str, torch.Tensor], float]) -> Any:
    """diffusers' own pipeline with LoRAs loaded by its own loader."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for number, (state, _) in enumerate(states):
        pipeline.load_lora_weights(dict(state), adapter_name=f"a{number}")
    pipeline.set_adapters([f"a{n}" for n in range(len(states))], [scale for _, scale in states])
    return pipeline


def test_two_kohya_loras_are_those_that_diffusers_loads(unet: Any, tiny_folder: Path, tmp_path: Path) -> None:
    one = random_lora(unet, WITH_CONVOLUTIONS, "lora_unet_")
    two = random_lora(unet, ATTENTION, "lora_unet_", rank=2, alpha=None, seed=9)
    for name, state in (("one", one), ("two", two)):
        save_file(state, tmp_path / f"{name}.safetensors")
    live = with_diffusers(tiny_folder, (one, 0.7), (two, -0.5)).unet
    given = ((tmp_path / "one.safetensors", 0.7), (tmp_path / "two.safetensors", -0.5))
    assert live_and_merged(tiny_folder, given, live) > FLOOR_DB


def test_a_kohya_lora_of_the_text_encoder_is_merged_there(tiny_folder: Path, tmp_path: Path) -> None:
    encoder = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None).text_encoder
    state = random_lora(encoder, r".*\.(q_proj|fc1|out_proj)", "lora_te_", text=True)
    save_file(state, tmp_path / "te.safetensors")
    ids = torch.arange(77)[None]
    with torch.no_grad():
        live = with_diffusers(tiny_folder, (state, 1.0)).text_encoder(ids).last_hidden_state
        merged = load(opened(tiny_folder, (tmp_path / "te.safetensors", 1.0)).components["text_encoder"])(ids)
    assert snr_db(live, merged) > FLOOR_DB


def kohya_to(style: Callable[[str], str], state: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, Any]:
    """A kohya LoRA without alpha, its keys written by `style` (which takes the dotted module's name and the end)."""
    return {style(f"{names[k.split('.')[0]]}|{k.split('.')[1]}"): v for k, v in state.items()}


STYLES: dict[str, Callable[[str], str]] = {
    "diffusers": lambda k: "unet." + k.replace("|lora_down", ".lora_A.weight").replace("|lora_up", ".lora_B.weight"),
    "diffusers 0.2x": lambda k: (
        "unet." + k.replace("|lora_down", ".lora.down.weight").replace("|lora_up", ".lora.up.weight")
    ),
    "attention processors": lambda k: (
        "unet."
        + k.replace("to_out.0", "to_out")
        .replace("attn1.", "attn1.processor.")
        .replace("attn2.", "attn2.processor.")
        .replace("|lora_", "_lora.")
        + ".weight"
    ),
    "peft": lambda k: (
        "base_model.model."
        + k.replace("|lora_down", ".lora_A.default.weight").replace("|lora_up", ".lora_B.default.weight")
    ),
}


@pytest.mark.parametrize("style", list(STYLES))
def test_every_key_style_is_the_same_adapter(style: str, unet: Any, tiny_folder: Path, tmp_path: Path) -> None:
    state = random_lora(unet, ATTENTION, "lora_unet_", alpha=None)
    names = {"lora_unet_" + name.replace(".", "_"): name for name, _ in unet.named_modules()}
    save_file(state, tmp_path / "kohya.safetensors")
    save_file(kohya_to(STYLES[style], state, names), tmp_path / "other.safetensors")
    places = [tmp_path / f"{name}.safetensors" for name in ("kohya", "other")]
    a, b = (Weights(opened(tiny_folder, (place, 1.0)).components["unet"]) for place in places)
    for name in a.names():
        np.testing.assert_array_equal(a.read(name), b.read(name), err_msg=name)


def sgm(name: str) -> str:
    """kohya's name of a module of SDXL's UNet, which it trains under the original names."""
    path, _, _ = unet_name(f"{name}.weight", layers=1, attention_up={0}).rpartition(".")
    return "lora_unet_" + path.replace(".", "_")


def test_a_kohya_lora_of_sdxl_is_matched_through_the_original_names(tmp_path: Path) -> None:
    pipeline = original_pipeline("sdxl")
    file = write_ldm(tmp_path / "model.safetensors", ldm_tensors(pipeline))
    generator = torch.Generator().manual_seed(5)
    wanted = (
        rf"({ATTENTION}|.*\.(conv1|conv_shortcut|time_emb_proj)|.*samplers\.0\.conv|conv_in|conv_out|add_embedding\..*)"
    )
    dotted: dict[str, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, layer in pipeline.unet.named_modules():
        if re.fullmatch(wanted, name) and hasattr(layer, "weight"):
            out, into, *kernel = layer.weight.shape
            down = torch.randn(2, into, *kernel, generator=generator)
            up = torch.randn(out, 2, *[1] * len(kernel), generator=generator)
            dotted |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
            state |= {f"{sgm(name)}.lora_down.weight": down, f"{sgm(name)}.lora_up.weight": up}
    encoders = {"lora_te1_": pipeline.text_encoder, "lora_te2_": pipeline.text_encoder_2}
    for prefix, encoder in encoders.items():
        state |= random_lora(encoder, r".*\.(q_proj|fc1)", prefix, text=True)
    save_file(state, tmp_path / "kohya.safetensors")
    save_file(dotted, tmp_path / "diffusers.safetensors")

    def components(name: str) -> Checkpoint:
        given = Companions(tokenizer=DEMO_FOLDER / "tokenizer", adapters=((tmp_path / name, 1.0),))
        return open_checkpoint(file, companions=given, survey=False)

    kohya = components("kohya.safetensors")
    one, other = (Weights(each.components["unet"]) for each in (kohya, components("diffusers.safetensors")))
    changed = {change.parameter for change in kohya.components["unet"].adapted}
    assert len(changed) == len(dotted) // 2
    for name in changed:
        np.testing.assert_array_equal(one.read(name), other.read(name), err_msg=name)
    assert kohya.components["text_encoder"].adapted
    assert kohya.components["text_encoder_2"].adapted
    # the first encoder's last layer is not part of the model: its two modules are told, not refused
    assert any("also changes 2 modules that nothing computes with" in remark for remark in kohya.remarks)


def only(folder: Path, place: Path, parameter: str, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """One parameter before and after an adapter."""
    weights = Weights(opened(folder, (place, scale)).components["unet"])
    return torch.from_numpy(weights.read_unchanged(parameter)), torch.from_numpy(weights.read(parameter))


CONV = "down_blocks.0.resnets.0.conv1"
FLAT = "lora_unet_" + CONV.replace(".", "_")
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT_QUERY = "lora_unet_" + QUERY.replace(".", "_")


def test_a_tucker_lora_is_its_three_convolutions_one_after_the_other(tiny_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    down, mid, up = torch.randn(3, 16, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(16, 3, 1, 1)
    state = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.5)}
    save_file({f"{FLAT}.{k}": v for k, v in state.items()}, tmp_path / "t.safetensors")
    before, after = only(tiny_folder, tmp_path / "t.safetensors", f"{CONV}.weight", 2.0)
    x = torch.randn(1, 16, 6, 6)
    conv = torch.nn.functional.conv2d
    live = conv(x, before, padding=1) + 2.0 * 1.5 / 3 * conv(conv(conv(x, down), mid, padding=1), up)
    assert snr_db(live, conv(x, after, padding=1)) > FLOOR_DB


@pytest.mark.parametrize("axis", [0, 1])
def test_kohyas_dora_scale_weighs_rows_or_columns(axis: int, tiny_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    down, up = torch.randn(4, 16), torch.randn(16, 4)
    magnitude = torch.rand(16, 1) + 0.5 if axis == 0 else torch.rand(1, 16) + 0.5
    state = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0), "dora_scale": magnitude}
    save_file({f"{FLAT_QUERY}.{k}": v for k, v in state.items()}, tmp_path / "d.safetensors")
    before, after = only(tiny_folder, tmp_path / "d.safetensors", f"{QUERY}.weight")
    changed = before + 0.5 * up @ down
    expected = magnitude * changed / changed.norm(dim=1 - axis, keepdim=True)
    assert snr_db(expected, after) > FLOOR_DB


def test_lycoris_oft_turns_blocks_of_outputs(tiny_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = torch.randn(4, 4, 4) * 0.2
    state = {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}
    save_file({f"{FLAT_QUERY}.{k}": v for k, v in state.items()}, tmp_path / "o.safetensors")
    before, after = only(tiny_folder, tmp_path / "o.safetensors", f"{QUERY}.weight")
    turns = []
    for block in blocks.double():
        skew = block - block.T
        turns.append((torch.eye(4) + skew) @ torch.linalg.inv(torch.eye(4) - skew))
    whole = torch.block_diag(*turns)
    assert snr_db(torch.eye(16).double(), whole @ whole.T) > FLOOR_DB  # a rotation keeps lengths
    assert snr_db(whole.T @ before.double(), after.double()) > FLOOR_DB
    _, half = only(tiny_folder, tmp_path / "o.safetensors", f"{QUERY}.weight", 0.5)
    assert snr_db((before + after) / 2, half) > FLOOR_DB


def test_whole_differences_of_weight_and_bias_are_added(tiny_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    diff, bias = torch.randn(16, 16, 3, 3), torch.randn(16)
    save_file({f"{FLAT}.diff": diff, f"{FLAT}.diff_b": bias}, tmp_path / "f.safetensors")
    for name, values in (("weight", diff), ("bias", bias)):
        before, after = only(tiny_folder, tmp_path / "f.safetensors", f"{CONV}.{name}", 0.5)
        assert snr_db(before + 0.5 * values, after) > FLOOR_DB


def test_half_precision_weights_keep_the_change_in_float32(tiny_folder: Path, tmp_path: Path) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None, torch_dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half")
    state = random_lora(pipeline.unet, ATTENTION, "lora_unet_")
    save_file({k: v * 1e-3 for k, v in state.items() if "alpha" not in k}, tmp_path / "small.safetensors")
    found = opened(tmp_path / "half", (tmp_path / "small.safetensors", 1.0)).components["unet"]
    weights = Weights(found)
    assert weights.spec(f"{QUERY}.weight")[0] == "float32"
    assert weights.spec(f"{CONV}.weight")[0] == "float16"
    moved = weights.read(f"{QUERY}.weight") - weights.read_unchanged(f"{QUERY}.weight").astype(np.float32)
    assert 0 < np.abs(moved).max() < 1e-5  # below a half's resolution


# --- what does not match


def refusal(folder: Path, place: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        opened(folder, (place, 1.0))
    assert caught.value.exit_code == 4
    return caught.value


def test_an_adapter_of_which_only_a_part_matches_is_refused_with_the_rest(
    unet: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    state = random_lora(unet, ATTENTION, "lora_unet_")
    state["lora_unet_down_blocks_7_attn1_to_q.lora_down.weight"] = torch.zeros(4, 16)
    state["lora_unet_down_blocks_7_attn1_to_q.lora_up.weight"] = torch.zeros(16, 4)
    save_file(state, tmp_path / "part.safetensors")
    problem = refusal(tiny_folder, tmp_path / "part.safetensors").what
    assert "without a match: lora_unet_down_blocks_7_attn1_to_q" in problem
    assert "only " in problem


def test_an_adapter_of_another_family_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    state = {f"transformer.single_transformer_blocks.0.attn.to_q.lora_{s}.weight": torch.zeros(4, 4) for s in "AB"}
    save_file(state, tmp_path / "flux.safetensors")
    assert "nothing of it matches" in refusal(tiny_folder, tmp_path / "flux.safetensors").what


def test_an_adapter_for_another_width_is_refused_from_its_header(tiny_folder: Path, tmp_path: Path) -> None:
    save_file(
        {f"{FLAT_QUERY}.lora_down.weight": torch.zeros(4, 320), f"{FLAT_QUERY}.lora_up.weight": torch.zeros(320, 4)},
        tmp_path / "wide.safetensors",
    )
    assert "made for a weight of 102400 values" in refusal(tiny_folder, tmp_path / "wide.safetensors").what


def test_what_is_no_adapter_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    assert "no such file" in refusal(tiny_folder, tmp_path / "gone.safetensors").what
    whole = tiny_folder / "unet/diffusion_pytorch_model.safetensors"
    assert "of no adapter known here" in refusal(tiny_folder, whole).what
    save_file({f"{FLAT_QUERY}.oft_r": torch.zeros(4, 4, 4)}, tmp_path / "old.safetensors")
    assert "before 0.16" in refusal(tiny_folder, tmp_path / "old.safetensors").what
    save_file({f"{FLAT_QUERY}.oft_blocks": torch.zeros(2, 4, 4, 4)}, tmp_path / "boft.safetensors")
    assert "BOFT as LyCORIS stores it" in refusal(tiny_folder, tmp_path / "boft.safetensors").what
    save_file({f"{FLAT_QUERY}.lora_down.weight": torch.zeros(4, 16)}, tmp_path / "half.safetensors")
    assert "has only down" in refusal(tiny_folder, tmp_path / "half.safetensors").what


def test_an_adapter_that_was_never_trained_is_said_to_change_nothing(
    unet: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    state = {k: v * (0 if "lora_up" in k else 1) for k, v in random_lora(unet, ATTENTION, "lora_unet_").items()}
    save_file(state, tmp_path / "zero.safetensors")
    source = opened(tiny_folder, (tmp_path / "zero.safetensors", 1.0)).components["unet"]
    with pytest.raises(CheckpointError, match="change none of the"):
        MeasureMovement(source).run(tmp_path)


# --- what it does to the checkpoint


def test_every_weight_is_reported_with_how_far_it_moved(unet: Any, tiny_folder: Path, tmp_path: Path) -> None:
    state = random_lora(unet, ATTENTION, "lora_unet_")
    save_file(state, tmp_path / "a.safetensors")
    source = opened(tiny_folder, (tmp_path / "a.safetensors", 1.0)).components["unet"]
    movement = MeasureMovement(source).run(tmp_path)
    moved = movement.read()
    assert len(moved) == len(state) // 3
    before = unet.state_dict()[f"{QUERY}.weight"]
    delta = 2.0 / 4 * state[f"{FLAT_QUERY}.lora_up.weight"] @ state[f"{FLAT_QUERY}.lora_down.weight"]
    assert moved[f"{QUERY}.weight"] == pytest.approx(float(delta.norm() / before.norm()), rel=1e-5)
    assert f"moved {len(moved)} weights of unet" in movement.summary()


def test_digests_cover_content_and_scale_and_nothing_else(unet: Any, tiny_folder: Path, tmp_path: Path) -> None:
    state = random_lora(unet, ATTENTION, "lora_unet_")
    save_file(state, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors")
    save_file({k: v * 1.01 for k, v in state.items()}, tmp_path / "c.safetensors")

    def digests(*adapters: tuple[str, float]) -> tuple[str, str]:
        given = tuple((tmp_path / f"{name}.safetensors", scale) for name, scale in adapters)
        found = open_checkpoint(tiny_folder, companions=Companions(adapters=given))
        return found.components["unet"].digest, found.components["text_encoder"].digest

    plain, base = digests(), digests(("a", 1.0))
    assert base == digests(("b", 1.0))
    others = [digests(("a", 0.5)), digests(("c", 1.0)), digests(("a", 1.0), ("b", 1.0))]
    assert len({unet_digest for unet_digest, _ in (plain, base, *others)}) == 5
    assert plain[1] == base[1]  # the text encoder is as it was


def test_an_lcm_lora_brings_its_schedule(unet: Any, tiny_folder: Path, tmp_path: Path) -> None:
    state = random_lora(unet, ATTENTION, "lora_unet_")
    folder = tmp_path / "lcm-lora-sdv1-5"
    folder.mkdir()
    save_file(state, folder / "pytorch_lora_weights.safetensors")
    found = opened(tiny_folder, (folder, 1.0))
    assert found.scheduler["_class_name"] == "LCMScheduler"
    assert any("LCM-LoRA by its name" in remark for remark in found.remarks)
    save_file(state, tmp_path / "welcome.safetensors")  # no word of its own in there
    assert opened(tiny_folder, (tmp_path / "welcome.safetensors", 1.0)).scheduler["_class_name"] == "DDIMScheduler"
