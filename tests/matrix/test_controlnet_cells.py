"""Every family with a ControlNet, on every runtime. docs/kinds.md shows what is measured here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from diffusette.bundle.draw import draw_with_bundle
from diffusette.runtimes.registry import TARGETS
from diffusette.runtimes.txt2img.control import Control
from diffusette.stages.artifacts import Companions
from diffusette.stages.cache import Cache
from diffusette.stages.errors import UsageError
from diffusette.stages.progress import Silent
from diffusette.validate.goldens.of_bundle import replay_goldens
from diffusette.validate.reference.probes import probe_control

from ..kinds import CONTROLLED, tiny_controlnet
from .cells import SIZE, Rows, check_cell, note, one_process

pytestmark = pytest.mark.matrix

CELLS: Final = [(kind, target) for kind in CONTROLLED for target in TARGETS]


@pytest.fixture(scope="module")
def rows(cells_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rows]:
    with one_process():
        yield Rows(cells_cache, tmp_path_factory.mktemp("rows"), goldens=True)


@pytest.mark.parametrize(("kind", "target"), CELLS)
def test_a_checkpoint_with_a_controlnet_converts_validates_and_follows_pictures(
    kind: str, target: str, rows: Rows, kind_folder: Callable[[str], Path]
) -> None:
    def make(place: Path) -> tuple[Path, Companions]:
        base, _ = CONTROLLED[kind]
        tiny_controlnet(base).save_pretrained(place / "controlnet")
        return kind_folder(base), Companions(controlnet=place / "controlnet")

    bundle = rows.bundle(kind, target, make)
    edges = probe_control(SIZE)
    assert edges.picture is not None
    found = check_cell(bundle, rows.cache, control=edges)
    assert {"controlnet", "unet"} <= set(bundle.components)
    pictures = [
        draw_with_bundle(bundle, "a red star", seed=3, control=control, progress=Silent()).image
        for control in (edges, Control(1 - edges.picture), Control(None, 0.0))
    ]
    assert all(np.abs(one - other).max() > 0.02 for one, other in combinations(pictures, 2))
    with pytest.raises(UsageError, match="needs a control picture"):
        draw_with_bundle(bundle, "a red star", progress=Silent())
    assert all(check.ok for check in replay_goldens(bundle, progress=Silent()).checks)
    assert (bundle.path / "goldens" / "control.png").is_file()
    note("kinds", kind, target, found)
