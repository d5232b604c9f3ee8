"""Bundles that earlier versions wrote still open, verify and draw the same picture."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from diffusette.bundle.bundle import open_bundle
from diffusette.bundle.manifest import SCHEMA
from diffusette.stages.progress import Silent
from diffusette.validate.goldens.of_bundle import replay_goldens

KEPT = Path(__file__).with_name("kept")


@pytest.mark.parametrize("schema", range(1, SCHEMA))
def test_a_kept_bundle_of_an_earlier_schema_draws_its_own_goldens(schema: int, tmp_path: Path) -> None:
    """A tiny random model for ncnn at fp16, with goldens; written by the last version of that schema."""
    with tarfile.open(KEPT / f"schema-{schema}.tgz") as packed:
        packed.extractall(tmp_path, filter="data")
    bundle = open_bundle(tmp_path)
    assert bundle.manifest.schema_ == schema
    assert bundle.verify().ok
    replayed = replay_goldens(bundle, progress=Silent())
    assert [check.what for check in replayed.checks if not check.ok] == []
    if replayed.goldens.schema_ == 1:  # they say nothing of what models were asked, and have the limits of float32
        assert {check.limit for check in replayed.checks} == {0, 1e-5, 90.0, 0.1}
        assert not any(check.golden_answers for check in replayed.checks)
