"""Every kind of checkpoint on every runtime, given nothing but its path. docs/kinds.md shows what is measured here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from diffusette.runtimes.registry import TARGETS
from diffusette.stages.artifacts import ALONE, Companions
from diffusette.stages.cache import Cache
from diffusette.stages.progress import Silent
from diffusette.validate.check import check_bundle
from diffusette.validate.compare import compare_bundles

from ..kinds import CONTROLLED, KINDS
from .cells import DOCS, Rows, check_cell, note, one_process

pytestmark = pytest.mark.matrix

CELLS: Final = [(kind, target) for kind in KINDS for target in TARGETS]
STEERED: Final = [(kind, target) for kind in CONTROLLED for target in TARGETS]  # in test_controlnet_cells


@pytest.fixture(scope="module")
def rows(cells_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rows]:
    with one_process():
        yield Rows(cells_cache, tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize(("kind", "target"), CELLS)
def test_a_checkpoint_converts_validates_and_draws_with_no_hint_but_its_path(
    kind: str, target: str, rows: Rows, kind_folder: Callable[[str], Path]
) -> None:
    def make(_: Path) -> tuple[Path, Companions]:
        return kind_folder(kind), ALONE

    bundle = rows.bundle(kind, target, make)
    assert bundle.manifest.family == KINDS[kind].family
    note("kinds", kind, target, check_cell(bundle, rows.cache))


# what each has besides what the demo has: the demo is looked into on every runtime
OWN_MODULES: Final = {
    ("sdxl", "ort"): {"unet": {"add_embedding.linear_1"}, "text_encoder_2": {"text_projection"}},
    ("sd1-inpainting", "ncnn"): {"unet": {"conv_in"}},
}


@pytest.mark.parametrize(("kind", "target"), OWN_MODULES)
def test_layers_of_a_kind_are_all_looked_into_and_none_is_wrong(
    kind: str, target: str, rows: Rows, kind_folder: Callable[[str], Path]
) -> None:
    bundle = rows.bundle(kind, target, lambda _: (kind_folder(kind), ALONE))
    report, _ = check_bundle(bundle, image=False, layers=True, threads=1, cache=rows.cache, progress=Silent())
    seen = {part.component: {layer.module for layer in part.layers} for part in report.layers}
    assert set(seen) == set(bundle.components)
    assert not any(part.bad for part in report.layers)
    for component, modules in OWN_MODULES[kind, target].items():
        assert modules <= seen[component]


def test_two_runtimes_of_sdxl_take_the_same_by_pytorchs_names(rows: Rows, kind_folder: Callable[[str], Path]) -> None:
    a, b = (rows.bundle("sdxl", target, lambda _: (kind_folder("sdxl"), ALONE)) for target in ("mnn", "ort"))
    found, remarks = compare_bundles(a, b, speed=False, threads=1, progress=Silent())
    assert found.ok
    assert remarks == []
    assert {part.component for part in found.components} == set(a.components)


def test_the_page_of_kinds_speaks_of_these_cells_alone() -> None:
    record = json.loads((DOCS / "kinds.json").read_text())
    assert {(kind, target) for kind, cells in record.items() for target in cells} <= {*CELLS, *STEERED}
