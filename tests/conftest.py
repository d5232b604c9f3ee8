"""Checkpoints for all tests: tiny random ones, and the trained one that the package embeds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

# Threads that wait shall sleep. By default they spin, and where tests run beside each other two spinning threads of
# ncnn take the cores that the thread they wait for would need: pictures took fifty times as long. Read when libgomp is
# loaded, so before anything else is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.stages.artifacts import Checkpoint

from .bundle.tiny_bundle import bundle, cells_cache, inputs  # noqa: F401 - fixtures
from .kinds import write_kind
from .models import write_tiny_sd1


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny random SD1.x. Read only: tests that change it take `tiny_copy`."""
    return write_tiny_sd1(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture
def tiny_copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_folder` for this test alone."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_folder: Path) -> Checkpoint:
    """`tiny_folder`, opened."""
    return open_checkpoint(tiny_folder)


@pytest.fixture(scope="session")
def demo_checkpoint() -> Checkpoint:
    """The embedded, really trained checkpoint, opened."""
    return open_checkpoint("demo")


@pytest.fixture(scope="session")
def kind_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The diffusers folder of a tiny checkpoint, by the name of its kind (`kinds.KINDS`). Read only."""
    return cache(lambda name: write_kind(name, tmp_path_factory.mktemp("kinds") / name))
