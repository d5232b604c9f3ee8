"""`convert --bits`, from the command line to a bundle that passed its gates; and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
from diffusette.bundle.bundle import open_bundle
from diffusette.quantize.plan import Plan
from diffusette.runtimes.checks import refuse_schemes
from diffusette.runtimes.mnn.target import MnnTarget
from diffusette.runtimes.ncnn.target import NcnnTarget
from diffusette.stages.errors import UnsupportedPrecision

from .conftest import Command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--bits", 4.5, "--budget", "3MB"), "exclude each other"),
        (("--bits", 4.5, "--precision", "fp16"), "--precision fp16 is for all layers"),
        (("--budget", ""), "--budget '' is not a size"),
        (("--budget", 0), "--budget 0 leaves nothing"),
        (("--budget", "1kB"), "--budget 1kB cannot be met on ort: the least is 4."),
        (("--bits", 0), "--bits 0 leaves nothing"),
        (("--bits", 1), "the least is 4."),
        (("--bits", 40), "--bits 40 exceeds the largest choice on ort: the most, fp16 everywhere, is 16.13 bits"),
        (("--budget", "300MB"), "hint: --precision fp16 or fp32 needs no search; or --bits 16.13 or --budget 9.61MB"),
        (("--min-snr", 500), "--min-snr 500 cannot be met: on these runtimes float32 itself is held to 100 dB"),
        (("--min-snr", -1), "allows errors as large as the answers\n  hint: for example --min-snr 40"),
        (("--bits", "inf"), "is not a number that can be reached"),
    ],
)
def test_goals_that_cannot_be_are_refused_before_any_work(
    command: Command, tmp_path: Path, words: tuple[object, ...], said: str
) -> None:
    answer = command("convert", "demo", "--target", "ort", "-o", tmp_path / "out", *words)
    assert answer.code == 2
    assert said in answer.err
    assert not list(tmp_path.iterdir())


def test_who_has_what_the_target_lacks_is_said() -> None:
    class Less(NcnnTarget):
        precisions: ClassVar[tuple[str, ...]] = ("fp32",)

    with pytest.raises(UnsupportedPrecision) as refused:
        refuse_schemes(Less(), "unet", Plan("w8c_a8"))
    assert "w8c_a8 runs on --target ort and --target ncnn and --target mnn" in refused.value.hint
    with pytest.raises(UnsupportedPrecision) as refused:
        refuse_schemes(Less(), "unet", Plan("w4g64r16_afp"))
    assert "w4g64r16_afp runs on --target ort and --target ncnn and --target mnn" in refused.value.hint
    with pytest.raises(UnsupportedPrecision) as refused:
        refuse_schemes(Less(), "unet", Plan("w8cr16_a8"))
    assert "runs on" not in refused.value.hint  # a branch goes with float activations only


def test_who_builds_a_branch_is_said_where_the_target_has_the_scheme_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Plain(NcnnTarget):
        low_rank: ClassVar[bool] = False
        group_channels: ClassVar[int] = 0

    monkeypatch.setattr(MnnTarget, "low_rank", False)
    with pytest.raises(UnsupportedPrecision, match="is not built for target 'ncnn'") as refused:
        refuse_schemes(Plain(), "unet", Plan("w4g64r16_afp"))
    assert refused.value.hint == "use w4g64_afp; w4g64r16_afp runs on --target ort and --target ncnn"


@pytest.mark.parametrize(
    ("target", "precision", "said"),
    [
        ("ncnn", "w4c_a8", "w4g128_afp, w8c_a8"),
        ("mnn", "w5c_afp", "it runs: fp32, fp16, w8c_afp"),
        ("ort", "w4g64_a8", "w8c_a8"),
    ],
)
def test_a_scheme_that_the_target_lacks_is_refused_with_its_list(
    command: Command, tmp_path: Path, target: str, precision: str, said: str
) -> None:
    answer = command("convert", "demo", "--target", target, "-o", tmp_path / "out", "--precision", precision)
    assert answer.code == 4
    assert f"target '{target}' does not run any component at '{precision}'" in answer.err
    assert said in answer.err
    assert not list(tmp_path.iterdir())


def kill_after(stages: int, cache: Path, words: tuple[object, ...]) -> list[str]:
    """Start `diffusette` in a process of its own, SIGKILL it in the stage after so many; the stages it had finished."""
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusette", *map(str, words)],
        env={**os.environ, "DIFFUSETTE_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    finished: list[str] = []
    for line in process.stderr:
        if line.startswith("+ "):
            finished.append(line[2:38].strip())
        if len(finished) == stages:
            time.sleep(0.2)
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    return finished


@pytest.mark.slow
def test_a_killed_search_goes_on_and_writes_a_recipe_a_plot_and_a_bundle_that_the_recipe_gives_again(
    command: Command, cache: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    base, out, again = tmp_path / "base.toml", tmp_path / "out", tmp_path / "again"
    base.write_text(
        'schema = 1\n[calibrate]\nprompts = ["a red circle", "two stars"]\n'
        '[quantize]\nrounding = "gptq"\n[schedule]\nalso = []\n'
    )
    words = ("convert", tiny_folder, "--target", "ort", "--no-gate", "--json")
    before = kill_after(4, cache, (*words, "-r", base, "--bits", 6, "-o", out))
    assert "text_encoder try-layers" in before
    assert not list(tmp_path.glob("out*"))
    answer = command(*words, "-r", base, "--bits", 6, "-o", out)
    assert answer.code == 0, answer.err
    ran = [line[2:38].strip() for line in answer.err.splitlines() if line.startswith("+ ")]
    assert "unet try-layers" in ran
    assert not set(before) & set(ran)  # the kill cost at most the stage that it hit
    menu = answer.json["search"]["menu"]
    (chosen,) = [row for row in menu if row["chosen"]]
    assert chosen["bits_per_weight"] <= 6
    bits, quality = ([row[key] for row in menu] for key in ("bits_per_weight", "image_psnr_db"))
    assert bits == sorted(bits)
    assert quality[-1] > quality[0]
    assert all(row["measured"] and 0 < row["unet_ms"]["ort"] < 1000 for row in menu)
    recipe = tmp_path / "out.recipe.toml"
    assert answer.json["search"]["tuned"] is None  # as the recipe asks
    assert 'rounding = "gptq"' in recipe.read_text()
    assert (tmp_path / "out.frontier.png").stat().st_size > 10_000
    bundle = open_bundle(out)
    assert bundle.manifest.recipe == recipe.read_text()
    assert len({scheme for entry in bundle.manifest.components.values() for scheme in entry.schemes}) > 2
    answer = command(*words, "-r", recipe, "-o", again)
    assert answer.code == 0, answer.err
    ours, theirs = ({file.path: file.sha256 for file in each.manifest.files()} for each in (bundle, open_bundle(again)))
    weights = [name for name in ours if name.endswith((".onnx", ".onnx_data", ".ort"))]
    assert weights
    assert {name: ours[name] for name in weights} == {name: theirs[name] for name in weights}


@pytest.mark.full
@pytest.mark.parametrize("target", ["ort", "ncnn", "mnn"])
def test_the_demo_at_four_and_a_half_bits_passes_its_gates(target: str, command: Command, tmp_path: Path) -> None:
    answer = command("convert", "demo", "--target", target, "--bits", 4.5, "-o", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    (chosen,) = [row for row in answer.json["search"]["menu"] if row["chosen"]]
    assert 4.4 < chosen["bits_per_weight"] <= 4.5
    assert chosen["image_psnr_db"] > 36  # plain 4 bits: 26 to 29
    tuned = answer.json["search"]["tuned"]
    assert tuned["image_psnr_db"] > 36
    before, after = tuned["held_out_db"]["unet"]
    assert after > before + 2
    assert open_bundle(tmp_path / "out").manifest.gate == "passed"
    checked = command("validate", tmp_path / "out", "--json")
    assert checked.code == 0, checked.err
