"""Every layout and every adapter on every runtime. docs/kinds.md shows what is measured here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from diffusette.bundle.bundle import Bundle
from diffusette.bundle.draw import draw_with_bundle
from diffusette.runtimes.registry import TARGETS
from diffusette.stages.artifacts import Companions
from diffusette.stages.cache import Cache
from diffusette.stages.progress import Silent
from diffusette.validate.tolerances import image_tolerance

from ..inputs import INPUTS, WORD
from .cells import DOCS, SIZE, Rows, check_cell, note, one_process

pytestmark = pytest.mark.matrix

CELLS: Final = [(name, target) for name in INPUTS for target in TARGETS]


@pytest.fixture(scope="module")
def rows(cells_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rows]:
    with one_process():
        yield Rows(cells_cache, tmp_path_factory.mktemp("rows"))


def bundle_of(rows: Rows, name: str, target: str) -> Bundle:
    def make(folder: Path) -> tuple[Path, Companions]:
        given = INPUTS[name].make(folder)
        return given.checkpoint, given.companions

    return rows.bundle(name, target, make, SIZE)


@pytest.mark.parametrize(("name", "target"), CELLS)
def test_an_input_converts_validates_and_draws(name: str, target: str, rows: Rows) -> None:
    bundle = bundle_of(rows, name, target)
    note("inputs", name, target, check_cell(bundle, rows.cache))
    if INPUTS[name].merged:
        moved = rows.done[name].moved["unet"]
        assert moved
        assert all(share > 0.001 for share in moved.values())


@pytest.mark.parametrize("target", list(TARGETS))
def test_an_lcm_lora_leaves_nothing_to_say(target: str, rows: Rows) -> None:
    manifest = bundle_of(rows, "lcm-lora", target).manifest
    assert (manifest.guidance.mode, manifest.guidance.default) == ("none", 1.0)
    assert (manifest.schedule.default["scheduler"], manifest.schedule.default["steps"]) == ("lcm", 4)


@pytest.mark.parametrize("target", list(TARGETS))
def test_new_words_draw_what_diffusers_draws_with_them(target: str, rows: Rows) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    bundle = bundle_of(rows, "words", target)
    assert bundle.manifest.tokenizer.added_tokens == (WORD, "blurry", "blurry_1", "blurry_2")
    made = rows.folder / "words"
    live: Any = StableDiffusionPipeline.from_pretrained(made / "model", safety_checker=None)
    live.set_progress_bar_config(disable=True)
    for name, token in (("learned_embeds", WORD), ("blurry", "blurry")):
        live.load_textual_inversion(made / f"{name}.safetensors", token=token)

    def drawn(prompt: str) -> tuple[Any, Any]:
        how = {"num_inference_steps": 20, "guidance_scale": 4.0, "negative_prompt": "blurry"}
        theirs = live(prompt, generator=torch.Generator().manual_seed(5), output_type="np", **how).images[0]
        how = {"scheduler": "ddim", "steps": 20, "guidance": 4.0, "negative": "blurry", "seed": 5, "threads": 1}
        return theirs, draw_with_bundle(bundle, prompt, progress=Silent(), **how).image

    theirs, ours = drawn(f"a {WORD} on a red ground")
    without, _ = drawn("a toy on a red ground")
    noise = np.mean((theirs - ours) ** 2)
    assert -10 * np.log10(noise) >= image_tolerance(target, "fp16").min_psnr_db
    assert np.mean((theirs - without) ** 2) > 100 * noise, "the word must matter, or the comparison proves nothing"


def test_the_page_of_inputs_speaks_of_these_cells_alone() -> None:
    record = json.loads((DOCS / "inputs.json").read_text())
    assert {(name, target) for name, cells in record.items() for target in cells} <= set(CELLS)
