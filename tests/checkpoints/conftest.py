"""What several files of tests of opening share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from diffusette.checkpoints import surveyed as surveyed_module

from ..ldm import Tensors, ldm_tensors, original_pipeline, write_ldm


@pytest.fixture
def no_weights_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any read of tensor data fail the test."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(surveyed_module, "survey_file", fail)
    monkeypatch.setattr(np, "fromfile", fail)


@pytest.fixture
def unet(tiny_folder: Path) -> Any:
    """The UNet of `tiny_folder`, for adapters to change."""
    return UNet2DConditionModel.from_pretrained(tiny_folder / "unet")


@pytest.fixture(scope="session")
def pipeline() -> Any:
    """What the single file `file` is written from. Read only, like the others."""
    return original_pipeline("sd1")


@pytest.fixture(scope="session")
def tensors(pipeline: Any) -> Tensors:
    return ldm_tensors(pipeline)


@pytest.fixture(scope="session")
def file(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ldm(tmp_path_factory.mktemp("single") / "model.safetensors", tensors)
