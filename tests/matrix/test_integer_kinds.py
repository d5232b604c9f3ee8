"""Weights of 8 and 4 bits, and a searched mixture, on kinds of checkpoints and every runtime: built, gated, drawn with.

Of every kind that asks something of its own of integers: v-prediction and linear projections (sd2), two text encoders
(sdxl), nine channels (inpainting), guidance as an input (lcm), a second UNet-like component (controlnet).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from diffusette.convert.build import TargetBuild
from diffusette.convert.search.goal import Goal
from diffusette.runtimes.registry import TARGETS
from diffusette.stages.artifacts import ALONE, Companions
from diffusette.stages.cache import Cache
from diffusette.validate.reference.probes import probe_control

from ..kinds import CONTROLLED, KINDS, tiny_controlnet
from .cells import SIZE, Rows, check_cell, one_process

pytestmark = pytest.mark.matrix

SEARCHED: Final = "--bits 6"  # of models so small that scales, biases and norms leave 5.2 to 5.4 at the least
CELLS: Final = [
    (kind, scheme, target)
    for kind in ("sd2", "sdxl", "sd1-inpainting", "lcm", "sdxl-controlnet")
    for scheme in ("w8c_afp", "w4g64_afp", SEARCHED)
    for target in TARGETS
]
# Two kinds of rows, of which the suite sees each runtime; all of them are run with the full-size models.
OFTEN: Final = {("sd2", "w4g64_afp"), ("lcm", "w8c_afp")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rows]:
    with one_process(), pytest.MonkeyPatch.context() as patch:
        # seconds for each model, to learn how fast a model of a few channels is
        patch.setattr(TargetBuild, "race", lambda self, models, probes: {})
        yield Rows(Cache(tmp_path_factory.mktemp("cache")), tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize(
    ("kind", "scheme", "target"),
    [pytest.param(*cell, marks=() if cell[:2] in OFTEN else pytest.mark.full) for cell in CELLS],
)
def test_integers_serve_every_kind_on_every_runtime(
    kind: str, scheme: str, target: str, rows: Rows, kind_folder: Callable[[str], Path]
) -> None:
    base = CONTROLLED[kind][0] if kind in CONTROLLED else kind

    def make(place: Path) -> tuple[Path, Companions]:
        if kind not in CONTROLLED:
            return kind_folder(kind), ALONE
        tiny_controlnet(base).save_pretrained(place / "controlnet")
        return kind_folder(base), Companions(controlnet=place / "controlnet")

    how: dict[str, Any] = {"goal": Goal(bits=6.0)} if scheme == SEARCHED else {"precision": scheme}
    bundle = rows.bundle(f"{kind} {scheme}", target, make, **how)
    components = bundle.manifest.components
    assert bundle.manifest.family == KINDS[base].family
    if scheme == SEARCHED:
        assert any("+" in part.precision for part in components.values())
    else:
        assert {part.precision for part in components.values()} == {scheme}
    check_cell(bundle, rows.cache, control=probe_control(SIZE) if kind in CONTROLLED else None)
