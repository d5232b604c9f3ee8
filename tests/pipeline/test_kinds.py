"""Every kind of checkpoint on every runtime: converted, gated, validated and drawn with, given nothing but its path.

docs/kinds.md is written from what these tests measured. Stages and sessions run in this process: what their own
processes are for is tested elsewhere, and starting some hundred of them would take most of the time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from diffusette.export.families.variant import variant_of
from diffusette.pipeline import child, sessions
from diffusette.pipeline.artifacts import Companions
from diffusette.pipeline.cache import Cache
from diffusette.pipeline.check import check_bundle
from diffusette.pipeline.convert import convert
from diffusette.pipeline.draw import draw_with_bundle
from diffusette.pipeline.errors import MissingTool, UsageError
from diffusette.pipeline.goldens import replay_goldens
from diffusette.pipeline.origin import open_reference_checkpoint
from diffusette.pipeline.progress import Silent
from diffusette.pipeline.recipe import Recipe, ScheduleChoice, load_recipe
from diffusette.pipeline.sampling import recipe_for
from diffusette.runtimes.registry import TARGETS, get_target, open_model
from diffusette.runtimes.txt2img.control import Control
from diffusette.validate.probes import probe_canvas, probe_control
from pydantic import TypeAdapter

from ..kinds import CONTROLLED, KINDS, tiny_controlnet, tiny_decoder

RECORD: Final = Path(__file__).parents[2] / "docs" / "kinds.json"
WRITE: Final = "DIFFUSETTE_WRITE_KINDS"
CELLS: Final = [(kind, target) for kind in KINDS for target in TARGETS]
STEERED: Final = [(kind, target) for kind in CONTROLLED for target in TARGETS]


def _in_this_process(stage: Any, into: Path, work: Path, watch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """`child.run_in_child` without the child; stages still go through JSON, as they do on their way to one."""
    kind: Any = TypeAdapter(type(stage))
    artifact = kind.validate_json(kind.dump_json(stage)).run(into)
    facts = TypeAdapter(stage.output).dump_python(artifact, mode="json")
    return {name: fact for name, fact in facts.items() if name not in ("folder", "digest")}, {"tree_peak_mib": 0}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cache]:
    """One cache for all: kinds that share a text encoder or a VAE share what is built of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "run_in_child", _in_this_process)
        patch.setattr(sessions, "open_isolated", lambda _, model, threads, **__: open_model(model, threads))
        root = tmp_path_factory.mktemp("cache")
        (root / "work").mkdir()  # the child's, which would make it
        yield Cache(root)


def recipe_of(folder: Path) -> Recipe:
    """The recipe that is taken for `folder`, without the further schedules: compiling thirty takes seconds a kind."""
    found = load_recipe(recipe_for(folder))
    lean = found.schedule.model_copy(update={"also": ()})
    assert isinstance(lean, ScheduleChoice)
    return found.model_copy(update={"schedule": lean})


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "target"), CELLS)
def test_a_checkpoint_converts_validates_and_draws_with_no_hint_but_its_path(
    kind: str, target: str, cache: Cache, kind_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    try:
        get_target(target).require()
    except MissingTool as missing:
        pytest.skip(f"{missing.what}: {missing.hint}")
    folder = kind_folder(kind)
    conversion = convert(folder, tmp_path / "out", recipe=recipe_of(folder), targets=(target,), cache=cache)
    assert conversion.ok, [part.to_json() for part in conversion.converted[0].parity.components]  # type: ignore[union-attr]
    bundle = conversion.converted[0].bundle
    assert bundle.manifest.family == KINDS[kind].family
    report, _ = check_bundle(bundle, cache=cache, progress=Silent())
    assert report.ok
    assert report.image is not None
    canvas = probe_canvas((64, 64)) if kind.endswith("inpainting") else None
    drawing = draw_with_bundle(bundle, "a red star", seed=3, canvas=canvas, progress=Silent())
    assert drawing.image.shape == (64, 64, 3)
    assert np.ptp(drawing.image) > 0.05
    variant = variant_of(open_reference_checkpoint(bundle, None, cache))
    assert (drawing.steps, drawing.guidance) == (variant.steps, variant.guidance)
    losses = {part.component: part.loss.snr_db for part in report.components if part.loss}
    note(kind, target, {"unet_db": round(losses["unet"], 1), "picture_db": round(report.image.psnr_db, 1)})


@pytest.mark.slow
@pytest.mark.parametrize("target", list(TARGETS))
def test_a_tiny_decoder_takes_the_place_of_the_vaes(
    target: str, cache: Cache, kind_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    tiny_decoder().save_pretrained(tmp_path / "taesd")
    folder, given = kind_folder("sd1"), Companions(vae_decoder=tmp_path / "taesd")
    conversion = convert(
        folder, tmp_path / "out", companions=given, recipe=recipe_of(folder), targets=(target,), cache=cache
    )
    assert conversion.ok
    manifest = conversion.converted[0].bundle.manifest
    assert manifest.vae.scaling_factor == 1
    assert manifest.vae.encoder_scaling_factor == pytest.approx(0.18215)
    decoder, encoder = (sum(f.bytes for f in manifest.components[n].files) for n in ("vae_decoder", "vae_encoder"))
    assert decoder < encoder
    drawing = draw_with_bundle(conversion.converted[0].bundle, "a red star", progress=Silent())
    assert np.ptp(drawing.image) > 0.01


# Every target once, and the one that is given SDXL's numbers in another form than its UNet; the others are much alike.
OFTEN: Final = {*(("sd1-controlnet", target) for target in TARGETS), ("sdxl-controlnet", "ncnn")}


@pytest.mark.parametrize(
    ("kind", "target"),
    [pytest.param(*cell, marks=pytest.mark.slow if cell in OFTEN else pytest.mark.full) for cell in STEERED],
)
def test_a_checkpoint_with_a_controlnet_converts_validates_and_follows_pictures(
    kind: str, target: str, cache: Cache, kind_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    try:
        get_target(target).require()
    except MissingTool as missing:
        pytest.skip(f"{missing.what}: {missing.hint}")
    base, _ = CONTROLLED[kind]
    tiny_controlnet(base).save_pretrained(tmp_path / "controlnet")
    folder, given = kind_folder(base), Companions(controlnet=tmp_path / "controlnet")
    conversion = convert(
        folder,
        tmp_path / "out",
        companions=given,
        recipe=recipe_of(folder),
        targets=(target,),
        goldens=base == "sd1",
        cache=cache,
    )
    assert conversion.ok, [part.to_json() for part in conversion.converted[0].parity.components]  # type: ignore[union-attr]
    bundle, gate = conversion.converted[0].bundle, conversion.converted[0].parity
    assert gate
    assert gate.image
    report, _ = check_bundle(bundle, image=base == "sd1", cache=cache, progress=Silent())
    assert report.ok
    losses = {part.component: part.loss.snr_db for part in report.components if part.loss}
    assert {"controlnet", "unet"} <= set(losses)
    edges = probe_control((64, 64))
    pictures = [
        draw_with_bundle(bundle, "a red star", seed=3, control=control, progress=Silent()).image
        for control in (edges, Control(1 - edges.picture), Control(None, 0.0))
    ]
    assert all(np.abs(one - other).max() > 0.02 for one, other in combinations(pictures, 2))
    with pytest.raises(UsageError, match="draws along a control picture"):
        draw_with_bundle(bundle, "a red star", progress=Silent())
    if base == "sd1":
        _, checks = replay_goldens(bundle, progress=Silent())
        assert all(check.ok for check in checks)
        assert (bundle.path / "goldens" / "control.png").is_file()
    note(kind, target, {"unet_db": round(losses["unet"], 1), "picture_db": round(gate.image.psnr_db, 1)})


def note(kind: str, target: str, found: dict[str, float]) -> None:
    """Write what a cell that passed has measured, when asked to measure for docs/kinds.md."""
    if os.environ.get(WRITE):
        record = json.loads(RECORD.read_text())
        record.setdefault(kind, {})[target] = found
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def test_the_page_of_kinds_speaks_of_these_cells_alone() -> None:
    record = json.loads(RECORD.read_text())
    assert {(kind, target) for kind, cells in record.items() for target in cells} <= {*CELLS, *STEERED}
