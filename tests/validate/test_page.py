"""The page of `validate --html`: says what the JSON says, loads nothing, escapes what strangers wrote, fits a phone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusette.bundle.bundle import Bundle
from diffusette.stages.errors import UsageError
from diffusette.validate.error_histogram import spread_of
from diffusette.validate.layers.advice import advice_for
from diffusette.validate.layers.examine import Layer
from diffusette.validate.layers.report import ComponentLayers, Range, layers_json
from diffusette.validate.pages.layer_section import layer_section
from diffusette.validate.pages.page import busy_note, parity_page
from diffusette.validate.pages.page_file import refuse_unwritable_page, write_page
from diffusette.validate.parity import Parity
from diffusette.validate.pictures import GAINS, Shown, difference_of
from diffusette.validate.report import ComponentReport, ImageReport, OracleReport, ParityReport, PictureReport
from diffusette.validate.tolerances import ImageTolerance, Tolerance

from .chromium import chromium, visit

HOSTILE = "\"><script>alert(1)</script><img src='https://evil.example/x.png' onerror=alert(1)>"
LIMIT = Tolerance(45.0, "eleven significant bits")
CLOSE, FAR = Parity(1e-3, 54.2, 60.0, 1.0), Parity(0.5, 20.0, 25.0, 0.99)


def drawn(prompt: str, seed: int, error: float) -> tuple[PictureReport, Shown]:
    rng = np.random.default_rng(seed)
    reference = rng.uniform(size=(32, 32, 3)).astype(np.float32)
    candidate = np.clip(reference + np.float32(error) * rng.standard_normal(reference.shape), 0, 1).astype(np.float32)
    psnr = -20 * np.log10(error)
    drift = tuple(float(psnr + 30 - step) for step in range(10))
    report = PictureReport(
        prompt, seed, CLOSE, Parity(error, psnr, psnr, 1.0), 0.999, drift, spread_of(reference, candidate)
    )
    return report, Shown(prompt, seed, reference, candidate)


@pytest.fixture
def report() -> tuple[ParityReport, list[Shown]]:
    pairs = [
        drawn("a red star", 0, 1e-4),
        drawn(HOSTILE, 1, 1e-3),
        *(drawn(f"picture {i}", i, 1e-5) for i in range(2, 7)),
    ]
    image = ImageReport(tuple(pair[0] for pair in pairs), ImageTolerance(55.0, "rounding alone leaves 82"), 10, 4.0)
    unet = ComponentReport("unet", "fp16", LIMIT, CLOSE, f"{HOSTILE!r} step 3", 8, CLOSE, Tolerance(40.0, "sums"))
    vae = ComponentReport("vae_decoder", "fp16", LIMIT, CLOSE, "late", 3)
    return ParityReport("ort", (unet, vae), image, OracleReport(96.9, 96.9, 64, 1.6)), [pair[1] for pair in pairs]


def page_of(report: ParityReport, shown: list[Shown], bundle: Bundle, **more: Any) -> str:
    return parity_page(
        {**report.to_json(), **more}, bundle.manifest, shown, None, "diffusette validate out --html r.html"
    )


LAYERS = [
    {
        "component": "unet",
        "module": f"down_blocks.{i}.attentions.0.attn{1 + i % 2}.to_q",
        "op": "MatMul",
        "snr_db": 30.0 if i == 12 else 135.0,
        "carried_db": None if i == 2 else 130.0 - 7 * i,
        "lost_db": 90.0 - i,
        "ok": i != 12,
        "problem": "a value is NaN" if i == 12 else None,
        "rule": f"[[quantize.rules]]\nmatch = 'unet/down_blocks.{i}'",
    }
    for i in range(14)
]
FIRST_BAD = {"component": "unet", "module": LAYERS[12]["module"], "op": "MatMul", "snr_db": 30.0, "try": "verify it"}
RANGES = {
    "unet": [{"module": "mid_block", "op": "Conv", "peak": 32752.0, "of_fp16": 0.5, "near": True, "probe": "late"}]
}


@pytest.fixture
def page(report: tuple[ParityReport, list[Shown]], bundle: Bundle) -> str:
    manifest = bundle.manifest.model_copy(update={"name": HOSTILE})
    return page_of(*report, replace(bundle, manifest=manifest), layers=LAYERS, first_bad=FIRST_BAD, ranges=RANGES)


def test_the_verdict_comes_first_and_in_one_line(report: tuple[ParityReport, list[Shown]], bundle: Bundle) -> None:
    text = page_of(*report, bundle)
    heading = re.search(r"<h1>(.*?)</h1>", text)
    assert heading
    assert heading[1] == (
        "tiny on ort computes what PyTorch computes: 54.2 dB or better in every model, 60.0 dB in the pictures"
    )
    assert text.index("<h1>") < text.index("<h2>")
    parity, shown = report
    bad = replace(parity, components=(replace(parity.components[0], loss=FAR), parity.components[1]))
    text = page_of(bad, shown, bundle)
    assert "<h1>tiny on ort is not what PyTorch computes: unet is 20.0 dB from it, 45 dB needed</h1>" in text
    assert '<span class="pill bad">failed</span>' in text
    assert "with <code>--layers</code> names it" in text
    hidden = replace(parity.components[0], fidelity=FAR)
    text = page_of(replace(parity, components=(hidden, parity.components[1])), shown, bundle)
    assert "unet is 20.0 dB from its rounded weights, 40 dB needed" in text
    dead = replace(parity.components[0], loss=None, problem="mnn unet crashed with SIGSEGV")
    text = page_of(replace(parity, components=(dead, parity.components[1])), shown, bundle)
    assert "computes: unet: mnn unet crashed with SIGSEGV</h1>" in text


def test_what_strangers_wrote_is_text(page: str) -> None:
    assert "<script" not in page
    assert "<img src='https" not in page
    assert page.count("&lt;script&gt;") >= 4  # title, heading, prompt, alternative texts
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page.replace("xlink:href", "href"))


def test_the_worst_pictures_are_shown_each_three_times_with_words(page: str) -> None:
    images = re.findall(r"<img src=\"data:image/png;base64,[^\"]+\" alt=\"([^\"]+)\"", page)
    assert len(images) == 12  # four of seven, by PyTorch, by the runtime, and their difference
    assert "difference × 200; the largest is" in images[2]
    assert page.index(">a red star<") > page.index("PyTorch&#39;s picture of: &#34;&gt;")  # the worst first


def test_sections_that_were_not_measured_are_absent(report: tuple[ParityReport, list[Shown]], bundle: Bundle) -> None:
    parity, _ = report
    text = page_of(replace(parity, image=None, oracle=None), [], bundle)
    assert "<h2>Layers</h2>" not in text
    assert "<h2>Pictures</h2>" not in text
    assert "not measured for this page" in text
    crashed = replace(parity, image=ImageReport((), ImageTolerance(55.0, ""), 10, 4.0, problem="mnn unet crashed"))
    assert "mnn unet crashed" in page_of(crashed, [], bundle)


def test_layers_name_the_first_bad_module_and_what_to_try(page: str) -> None:
    worst = re.findall(r'<li class="card([^"]*)">\s*<header><h3 class="mono">([^<]+)', page)
    assert worst[0] == (" failed", "unet/down_blocks.12.attentions.0.attn1.to_q")  # wrong before costly
    assert worst[1] == ("", "unet/down_blocks.13.attentions.0.attn2.to_q")
    assert len(worst) == 10
    assert "computes something other than PyTorch: unet/down_blocks.12" in page
    assert "To try: verify it." in page
    assert "a value is NaN" in page
    assert "A part of an attention: the softmax" in page
    assert "match = &#39;unet/down_blocks.13&#39;" in page
    assert "match = &#39;unet/down_blocks.12&#39;" not in page, "more bits mend no module that is wrong"
    assert page.count('class="cell"') == 3 * 14
    assert "3.28e+04, 50.0% of float16" in page


def test_the_map_puts_other_runtimes_beside_this_one(report: tuple[ParityReport, list[Shown]], bundle: Bundle) -> None:
    parity, shown = report
    others = [{**layer, "snr_db": 50.0} for layer in LAYERS[:13]]
    more = {**others[0], "module": "mid_block.only_here"}
    facts = {**parity.to_json(), "layers": LAYERS, "first_bad": None}
    text = parity_page(facts, bundle.manifest, shown, None, "diffusette validate", {"mnn": [*others, more]})
    headings = re.findall(r'role="columnheader"[^>]*>([^<]+)<', text)
    assert headings == ["module", "ort", "mnn"]
    cells = re.findall(r'role="cell"[^>]*>([^<]+)<', text)
    assert len(cells) == 2 * 15
    assert cells[:2] == ["135", "50"]
    assert cells[-4:] == ["135", "–", "–", "50"]


def test_layers_with_the_least_of_keys_are_shown_too(report: tuple[ParityReport, list[Shown]], bundle: Bundle) -> None:
    least = [{"module": "conv_in", "op": "Conv", "snr_db": 101.0}]
    text = page_of(*report, bundle, layers=least, first_bad=None)
    assert "Every module computes what PyTorch computes" in text
    assert "101.0 dB" in text


def test_times_of_a_busy_machine_carry_a_warning() -> None:
    assert busy_note(None) == ""
    assert "load 9.2" in busy_note(9.2)


def test_the_difference_is_made_visible_and_says_by_how_much() -> None:
    black = np.zeros((8, 8, 3), np.float32)
    assert difference_of(black, black).gain == 0
    faint = difference_of(black, black + np.float32(0.9e-3))
    assert faint.gain == 1000
    assert faint.largest == pytest.approx(0.2295, rel=1e-3)
    assert difference_of(black, black + np.float32(1e-12)).gain == max(GAINS)
    outlier = np.zeros((20, 20, 3), np.float32)
    outlier[3, 3] = 1.0
    outlier[4:, 4:] = 0.9e-3
    assert difference_of(np.zeros_like(outlier), outlier).gain == 1000, "one wrong pixel must not darken the rest"
    assert difference_of(black, black + 1).gain == 1


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path, page: str) -> None:
    file = tmp_path / "new" / "report.html"
    write_page(file, page)
    write_page(file, page)
    assert file.read_text() == page
    other = tmp_path / "index.html"
    other.write_text("<html>my home page</html>")
    for wrong, said in (
        (other, "not a page that diffusette wrote"),
        (tmp_path, "is a folder"),
        (tmp_path / "report.pdf", r"written as \.html"),
        (other / "report.html", "cannot be written"),
    ):
        with pytest.raises(UsageError, match=said):
            refuse_unwritable_page(wrong)
    assert other.read_text() == "<html>my home page</html>"


with_browser = pytest.mark.skipif(chromium() is None, reason="there is no Chromium to look with")


@with_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_a_browser_shows_it_without_complaint_or_request(page: str, tmp_path: Path, width: int, dark: bool) -> None:
    file = tmp_path / "report.html"
    file.write_text(page)
    seen = visit(file, tmp_path, width=width, dark=dark)
    assert seen.console == ()
    assert seen.requests == ()
    assert seen.overflow <= 0
    assert seen.brightness < 100 if dark else seen.brightness > 150


@with_browser
def test_the_browser_would_notice_what_a_page_must_not_do(tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    wide = '<p style="width: 900px">wide</p>'
    file.write_text(
        f"<html><body>{wide}<img src='http://example.invalid/x.png'><script>console.log('hi')</script></html>"
    )
    seen = visit(file, tmp_path, width=390)
    assert any("hi" in line for line in seen.console)
    assert seen.requests == ("http://example.invalid/x.png",)
    assert seen.overflow > 500


@pytest.mark.parametrize(
    ("module", "op", "words"),
    [
        ("up_blocks.2.attentions.1.transformer_blocks.0.attn2.to_v", "Linear", "A part of an attention"),
        ("up_blocks.2.attentions.1.proj_in", "Conv2d", "A convolution"),
        ("up_blocks.2.attentions.0.transformer_blocks.0.ff.net.0.proj", "Linear", "A matrix product"),
        ("decoder.conv_out", "Conv2d", "A first or last convolution"),
        ("time_embedding.linear_1", "Linear", "The time embedding"),
        ("embeddings.token_embedding", "Embedding", "A table"),
        ("down_blocks.0.resnets.0.norm1", "GroupNorm", "A normalisation"),
    ],
)
def test_advice_is_about_the_module_itself_not_about_what_it_lies_in(module: str, op: str, words: str) -> None:
    assert advice_for(module, op).startswith(words)


def test_the_section_reads_the_keys_that_layers_are_written_with() -> None:
    layer = Layer("conv_in", "Conv2d", "t", 0, made_db=140.0, carried_db=90.0, max_abs=0.1, lost_db=70.0)
    found = ComponentLayers(
        "unet", "fp16", "late", (layer,), (Range("conv_in", "Conv2d", 65504.0, "late"),), 45.0, 3, 99.0
    )
    section = layer_section(layers_json([found]), "ort", {})
    assert section is not None
    (card,) = section["worst"]
    assert [meter["value"] for meter in card["meters"]] == [140.0, 90.0, 70.0]
    assert [cell["text"] for cell in section["map"]["rows"][0]["cells"]] == ["140", "90", "70"]
    assert section["largest"][0]["ok"] is False


def test_a_page_says_what_pictures_start_from_besides_their_prompt(
    report: tuple[ParityReport, list[Shown]], bundle: Bundle
) -> None:
    filling = bundle.manifest.model_copy(
        update={"conditioning": bundle.manifest.conditioning.model_copy(update={"input_channels": 9})}
    )
    facts, shown = report
    plain, page = (
        parity_page(facts.to_json(), manifest, shown, None, "diffusette validate out --html r.html")
        for manifest in (bundle.manifest, filling)
    )
    words = "Each fills in the middle of a bright disc on a smooth ground."
    assert words in page
    assert words not in plain
