"""Every kind of checkpoint on every runtime, given nothing but its path. docs/kinds.md shows what is measured here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from diffusette.pipeline.artifacts import ALONE, Companions
from diffusette.pipeline.cache import Cache
from diffusette.runtimes.registry import TARGETS

from ..kinds import CONTROLLED, KINDS
from .cells import DOCS, Rows, check_cell, note, one_process

CELLS: Final = [(kind, target) for kind in KINDS for target in TARGETS]
STEERED: Final = [(kind, target) for kind in CONTROLLED for target in TARGETS]  # in test_controlnet_cells


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rows]:
    with one_process():
        yield Rows(Cache(tmp_path_factory.mktemp("cache")), tmp_path_factory.mktemp("rows"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "target"), CELLS)
def test_a_checkpoint_converts_validates_and_draws_with_no_hint_but_its_path(
    kind: str, target: str, rows: Rows, kind_folder: Callable[[str], Path]
) -> None:
    def make(_: Path) -> tuple[Path, Companions]:
        return kind_folder(kind), ALONE

    bundle = rows.bundle(kind, target, make)
    assert bundle.manifest.family == KINDS[kind].family
    note("kinds", kind, target, check_cell(bundle, rows.cache))


def test_the_page_of_kinds_speaks_of_these_cells_alone() -> None:
    record = json.loads((DOCS / "kinds.json").read_text())
    assert {(kind, target) for kind, cells in record.items() for target in cells} <= {*CELLS, *STEERED}
