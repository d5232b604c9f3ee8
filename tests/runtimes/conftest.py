"""What several files of tests of one runtime share."""

from __future__ import annotations

import pytest
from diffusette.stages.artifacts import Checkpoint

from .ncnn.workshop import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Checkpoint) -> Workshop:
    """Of ncnn: pnnx runs once a component for all its tests."""
    return Workshop(tmp_path_factory.mktemp("ncnn"), demo_checkpoint.components)
