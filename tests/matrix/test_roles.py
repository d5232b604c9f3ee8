"""A family with another denoiser and two text encoders needs its own file and a line of roles."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusette.bundle.draw import draw_with_bundle
from diffusette.checkpoints import families
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.checkpoints.families.sdxl import SDXL
from diffusette.convert.convert import convert_checkpoint
from diffusette.convert.recipe import parse_recipe
from diffusette.runtimes.mnn.target import MnnTarget
from diffusette.runtimes.ncnn.target import NcnnTarget
from diffusette.runtimes.ort.target import OrtTarget
from diffusette.stages import artifacts
from diffusette.stages.cache import Cache
from diffusette.stages.progress import Silent
from diffusette.validate.check import check_bundle

from ..kinds import write_kind
from .cells import one_process, runtimes

pytestmark = pytest.mark.matrix

DENOISER = "denoising_network"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SDXL's networks as another family would have them: under another name of the denoiser."""

    def renamed(names: Any) -> Any:
        return {name.replace("unet.", f"{DENOISER}."): value for name, value in names.items()}

    parts = {name: part for name, part in SDXL.components.items() if name != "unet"}
    signature = SDXL.signature
    family = replace(
        SDXL,
        name="stand-in",
        title="A stand-in",
        components={**parts, DENOISER: replace(SDXL.components["unet"], folder=DENOISER)},
        signature=replace(
            signature,
            parts=tuple(DENOISER if part == "unet" else part for part in signature.parts),
            settings=renamed(signature.settings),
            given=tuple(renamed(dict.fromkeys(signature.given))),
        ),
        additions={},
    )
    monkeypatch.setattr(families, "FAMILIES", (family, *families.FAMILIES))
    roles: Any = artifacts.ROLES
    monkeypatch.setitem(roles, DENOISER, "denoiser")
    for target in (NcnnTarget, MnnTarget, OrtTarget):
        monkeypatch.setattr(target, "families", (*target.families, family.name))
    folder = write_kind("sdxl", tmp_path / "stand-in")
    (folder / "unet").rename(folder / DENOISER)
    index = json.loads((folder / "model_index.json").read_text())
    index[DENOISER] = index.pop("unet")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_another_denoiser_is_converted_proven_and_drawn_with(
    stand_in: Path, tmp_path: Path, cells_cache: Cache
) -> None:
    cells_cache.prepare()
    found = open_checkpoint(stand_in, survey=False)
    assert (found.family, found.denoiser.component) == ("stand-in", DENOISER)
    assert artifacts.with_role("text", found.components) == ("text_encoder", "text_encoder_2")
    with one_process():
        made = convert_checkpoint(
            stand_in,
            tmp_path / "out",
            recipe=parse_recipe("schema = 1\n[schedule]\nalso = []\n", "mine.toml"),
            targets=runtimes(),
            goldens=True,
            cache=cells_cache,
        )
        assert made.ok
        for each in made.converted:
            assert each.bundle.denoiser == DENOISER
            report, _ = check_bundle(each.bundle, threads=1, cache=cells_cache)
            assert report.ok
            assert report.image is not None
            assert draw_with_bundle(each.bundle, "a red star", threads=1, progress=Silent()).image.any()
