"""Reports: strict JSON with the promised keys, verdicts that follow the numbers, tables that render."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
from diffusette.validate.error_histogram import Spread
from diffusette.validate.parity import Parity
from diffusette.validate.report import (
    ComponentReport,
    ImageReport,
    OracleReport,
    ParityReport,
    PictureReport,
    parity_table,
)
from diffusette.validate.tolerances import ImageTolerance, Tolerance
from rich.console import Console

EXACT = Parity(0.0, math.inf, math.inf, 1.0)
CLOSE = Parity(1e-5, 110.0, 115.0, 1.0)
FAR = Parity(0.5, 20.0, 25.0, 0.99)
LIMIT = Tolerance(100.0, "only the order of sums differs")
SPREAD = Spread((0, 0, 0, 12288, *[0] * 8), 0.0)
PICTURE = PictureReport("a [red] circle", 0, CLOSE, Parity(1e-4, 80.0, 84.0, 1.0), 0.99999, (120.0, 110.0), SPREAD)
IMAGE = ImageReport((PICTURE,), ImageTolerance(70.0, "twenty steps amplify rounding"), 20, 4.0)


def component(name: str, loss: Parity | None, fidelity: Parity | None = None, problem: str = "") -> ComponentReport:
    wanted = LIMIT if fidelity else None
    return ComponentReport(name, "fp32", LIMIT, loss, "late", 3, fidelity, wanted, problem)


def test_json_has_the_promised_keys_and_no_infinity() -> None:
    report = ParityReport("ort", (component("unet", CLOSE), component("vae_decoder", EXACT)), IMAGE)
    facts = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert {"ok", "components", "layers", "first_bad", "image"} <= facts.keys()
    assert facts["ok"] is True
    assert list(facts["components"]) == ["unet", "vae_decoder"]
    unet = facts["components"]["unet"]
    assert (unet["max_abs"], unet["snr_db"], unet["psnr_db"], unet["ok"], unet["tolerance"]) == (
        1e-5,
        110.0,
        115.0,
        True,
        100.0,
    )
    assert facts["image"]["psnr_db"] == 84.0
    assert facts["image"]["ssim"] == 0.99999
    assert facts["image"]["drift_db"] == [120.0, 110.0]
    assert facts["image"]["pictures"][0]["histogram"]["counts"][3] == 12288


def test_any_failed_part_fails_the_report() -> None:
    good = component("unet", CLOSE)
    dark = ImageReport((), IMAGE.tolerance, 20, 4.0, problem="mnn crashed")
    assert ParityReport("ort", (good,), IMAGE, OracleReport(96.9, 96.9, 64, 1.0)).ok
    assert not ParityReport("ort", (component("unet", FAR),)).ok
    assert not ParityReport("ort", (component("unet", CLOSE, fidelity=FAR),)).ok
    assert not ParityReport("ort", (component("unet", None, problem="crashed"),)).ok
    assert not ParityReport("ort", (good,), dark).ok
    assert not ParityReport("ort", (good,), ImageReport((), IMAGE.tolerance, 20, 4.0)).ok, "no picture was drawn"
    assert not ParityReport("ort", (good,), IMAGE, OracleReport(90.6, 96.9, 64, 1.0)).ok
    assert ParityReport("ort", (good,), IMAGE, OracleReport(98.4, 96.9, 64, 1.0)).ok, "better is no loss"
    assert not ParityReport("ort", ()).ok, "nothing was compared"


@pytest.mark.parametrize(
    ("rounded", "ok", "said"),
    [
        (None, False, "60.0 dB PSNR, 70 dB needed"),
        (82.0, False, "60.0 dB PSNR, 70 dB needed; PyTorch with the same weights has 82.0"),  # it is the runtime
        (60.5, True, "ok; PyTorch with the same weights has 60.5"),  # it is the checkpoint
        (50.0, True, "ok; PyTorch with the same weights has 50.0"),
        (61.5, False, "60.0 dB PSNR, 60.5 dB needed; PyTorch with the same weights has 61.5"),
    ],
)
def test_pictures_below_their_tolerance_pass_only_where_rounding_alone_takes_as_much(
    rounded: float | None, ok: bool, said: str
) -> None:
    limit = ImageTolerance(70.0, "twenty steps amplify rounding", floor_db=55.0)
    image = replace(PICTURE.image, psnr_db=60.0)
    report = ImageReport((replace(PICTURE, image=image),), limit, 20, 4.0, rounded_db=rounded)
    assert (report.ok, report.verdict) == (ok, said)


def test_no_picture_passes_below_the_floor_and_the_remedy_is_named() -> None:
    limit = ImageTolerance(70.0, "twenty steps amplify rounding", floor_db=65.0)
    image = replace(PICTURE.image, psnr_db=60.0)
    report = ImageReport((replace(PICTURE, image=image),), limit, 20, 4.0, rounded_db=60.0)
    assert not report.ok
    assert report.verdict.endswith(
        "65 dB needed; PyTorch with the same weights has 60.0: this checkpoint needs more bits"
    )
    assert not replace(report, tolerance=replace(limit, floor_db=None)).ok


def test_a_fidelity_gate_without_a_measurement_fails() -> None:
    assert not ComponentReport("unet", "fp16", LIMIT, CLOSE, fidelity=None, fidelity_tolerance=LIMIT).ok


def test_failures_name_the_component_and_the_figures() -> None:
    report = ParityReport("ort", (component("unet", FAR), component("vae_decoder", CLOSE)), IMAGE)
    assert report.failures() == ["unet: 20.0 dB from PyTorch, 100 dB needed, at late"]


def test_a_loss_that_pytorch_with_the_same_weights_has_too_is_not_blamed_on_the_runtime() -> None:
    report = ComponentReport("unet", "w8c_afp", LIMIT, FAR, "late", 3, CLOSE, LIMIT)
    assert not report.ok
    assert report.verdict.endswith("so is PyTorch with the same weights: this checkpoint needs more bits")
    assert "bits" not in replace(report, fidelity=FAR).verdict


def test_a_problem_without_numbers_is_null_in_json() -> None:
    facts = component("unet", None, problem="ort unet crashed with SIGSEGV").to_json()
    assert facts["snr_db"] is None
    assert facts["ok"] is False
    assert "SIGSEGV" in facts["problem"]


def test_the_table_shows_figures_verdicts_and_literal_brackets() -> None:
    broken = component("text_encoder", None, problem="crashed in [attention]")
    report = ParityReport("ncnn", (broken, component("unet", CLOSE)), IMAGE, OracleReport(96.9, 96.9, 64, 1.0))
    out = io.StringIO()
    Console(file=out, width=200).print(parity_table(report))
    text = out.getvalue()
    for words in ("ncnn against PyTorch", "110.0", "crashed in [attention]", "84.0 PSNR", "96.9 %"):
        assert words in text
    heading, similarity = (next(line for line in text.splitlines() if word in line) for word in ("SNR dB", " SSIM"))
    assert similarity.index("SSIM") < heading.index("same weights")  # a figure of pictures, not of equal weights
