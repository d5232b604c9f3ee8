"""The tolerance table: complete for what ships, never looser than promised, no defaults."""

from __future__ import annotations

from itertools import product
from typing import Final

import numpy as np
import pytest
from diffusette.stages.artifacts import ROLES
from diffusette.stages.errors import UsageError
from diffusette.validate import tolerances
from diffusette.validate.parity import compare
from diffusette.validate.tolerances import (
    FOUR_BITS,
    IMAGE_TOLERANCES,
    TOLERANCES,
    Tolerance,
    apart,
    image_tolerance,
    pictures_apart,
    tolerance,
)

PROMISED = {("ort", "fp32"): 100, ("ncnn", "fp32"): 100, ("mnn", "fp32"): 80}  # dB, the floors of the first release


# Of the demo's weight matrices, the one that hides best when scaled by 1.1 in the fp16 model: its fidelity, dB.
HIDDEN = {"text_encoder": 40.7, "unet": 91.0, "vae_decoder": 82.0, "vae_encoder": 88.6}


@pytest.mark.parametrize(("component", "target"), list(product(ROLES, ("ort", "ncnn", "mnn"))))
def test_no_gate_is_looser_than_promised(component: str, target: str) -> None:
    assert tolerance("loss", component, target, "fp32").min_snr_db >= PROMISED[target, "fp32"]
    assert tolerance("loss", component, target, "fp16").min_snr_db >= 45
    assert tolerance("fidelity", component, target, "fp16").min_snr_db > HIDDEN.get(component, max(HIDDEN.values()))
    assert image_tolerance(target, "fp32").min_psnr_db >= 70
    assert image_tolerance(target, "fp16").min_psnr_db >= 55
    assert image_tolerance(target, "w8c_afp").min_psnr_db >= 45
    assert all(row.floor_db is None or row.floor_db < row.min_psnr_db for row in IMAGE_TOLERANCES.values())


# What an intact demo leaves of a component that is not the denoiser, and of that, less a few dB: (loss, fidelity).
LEAST: Final = {"w8c_afp": ((25, 15), (85, 95)), "w8c_a8": ((22, 7), (22, 7)), "w4": ((8, 0), (85, 95))}


@pytest.mark.parametrize("row", TOLERANCES, ids="-".join)
def test_no_row_of_integer_weights_can_be_loosened_in_passing(row: tuple[str, str, str, str]) -> None:
    """A gate that may be lowered to anything while every test stays green guards nothing."""
    gate, role, _, scheme = row
    least = LEAST.get("w4" if scheme.startswith("w4") else scheme)
    if least:
        assert TOLERANCES[row].min_snr_db >= least[gate == "fidelity"][role == "denoiser"]  # type: ignore[index]


@pytest.mark.parametrize("target", ["ort", "ncnn", "mnn"])
def test_no_picture_of_integer_weights_can_be_loosened_in_passing(target: str) -> None:
    assert image_tolerance(target, "w8c_a8").min_psnr_db >= 36
    assert all(image_tolerance(target, scheme).min_psnr_db >= 20 for scheme in FOUR_BITS)


def test_fidelity_is_always_stricter_than_loss() -> None:
    """Else it would catch nothing that the loss gate lets through."""
    for component, target in product(ROLES, ("ort", "ncnn", "mnn")):
        loss = tolerance("loss", component, target, "fp16").min_snr_db
        assert tolerance("fidelity", component, target, "fp16").min_snr_db > loss


@pytest.mark.parametrize("target", ["ort", "ncnn", "mnn"])
def test_a_loss_that_only_rounding_makes_passes_and_one_that_is_seen_does_not(target: str) -> None:
    intact = 30.1  # dB: the second text encoder of a random SDXL at 8 bits a channel, 113 dB in fidelity
    assert tolerance("loss", "text_encoder_2", target, "w8c_afp").min_snr_db <= intact - 5
    assert image_tolerance(target, "w8c_afp").min_psnr_db >= tolerances.AUTO_IMAGE_DB, "auto promises what is not seen"
    assert tolerance("fidelity", "text_encoder_2", target, "w8c_afp").min_snr_db >= 85


def test_every_row_gives_a_reason() -> None:
    assert all(len(why) > 20 for table in (TOLERANCES, IMAGE_TOLERANCES) for why in (row.why for row in table.values()))


def test_a_missing_row_is_an_error_and_not_a_default() -> None:
    with pytest.raises(UsageError, match="loss tolerance for unet on ort at w3c_afp"):
        tolerance("loss", "unet", "ort", "w3c_afp")
    with pytest.raises(UsageError, match="image tolerance on ort at w3c_afp"):
        image_tolerance("ort", "w3c_afp")


def test_an_exact_row_goes_before_a_wildcard(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        ("loss", "*", "*", "fp16"): Tolerance(1.0, "any"),
        ("loss", "*", "ort", "fp16"): Tolerance(2.0, "target"),
        ("loss", "denoiser", "*", "fp16"): Tolerance(3.0, "role"),
        ("loss", "denoiser", "ort", "fp16"): Tolerance(4.0, "both"),
    }
    monkeypatch.setattr(tolerances, "TOLERANCES", table)
    cases = {("vae_decoder", "mnn"): 1, ("vae_decoder", "ort"): 2, ("unet", "mnn"): 3, ("unet", "ort"): 4}
    assert {case: tolerance("loss", *case, "fp16").min_snr_db for case in cases} == cases


@pytest.mark.parametrize(("first", "second"), [(95.0, 95.0), (60.0, 40.0), (6.5, 3.0), (20.0, 100.0)])
def test_two_that_keep_their_distance_from_a_third_keep_this_one_from_each_other(first: float, second: float) -> None:
    r = np.random.default_rng(0).standard_normal(1000)
    shorter, longer = (
        r * (1 - 10 ** (-first / 20)),
        r * (1 + 10 ** (-second / 20)),
    )
    assert compare(r, shorter).snr_db == pytest.approx(first)
    assert compare(r, longer).snr_db == pytest.approx(second)
    assert compare(shorter, longer).snr_db == pytest.approx(apart(first, second), abs=0.01)


def test_what_may_be_nothing_promises_nothing() -> None:
    assert apart(0.0, 50.0) == -np.inf
    assert apart(95.0, 95.0) == pytest.approx(95 - 6.02, abs=0.01)
    assert pictures_apart(55.0, 55.0) == pytest.approx(55 - 6.02, abs=0.01)


def test_a_gate_of_float16_arithmetic_holds_where_it_is_computed_and_still_sees_garbage() -> None:
    """One row serves x86, which computes such a graph in float32, and AArch64, which adds up in float16."""
    on_aarch64 = {"text_encoder": 48.4, "unet": 48.6, "vae_decoder": 53.0, "vae_encoder": 50.9}  # dB, the demo
    for component, seen in on_aarch64.items():
        for gate in ("loss", "fidelity"):
            least = tolerance(gate, component, "ort", "fp16_a16").min_snr_db
            assert 35 <= least <= seen - 5
    assert image_tolerance("ort", "fp16_a16").min_psnr_db >= tolerances.AUTO_IMAGE_DB
