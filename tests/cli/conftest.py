"""The demo converted once by the command line, for all tests of commands."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from diffusette.cli import run

TARGETS = ("ort", "ncnn", "mnn")


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Answer]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all workers of a parallel run: each stage is built by whoever comes first."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "diffusette-cache"


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cache: Path) -> Command:
    """Run `diffusette` with these words, in this process, with the suite's own cache."""
    monkeypatch.setenv("DIFFUSETTE_CACHE", str(cache))

    def call(*words: object) -> Answer:
        capfd.readouterr()
        code = run([str(word) for word in words])
        out, err = capfd.readouterr()
        return Answer(code, out, err)

    return call


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The folder of the demo's three fp16 bundles. Read only."""
    from diffusette.convert.convert import convert_checkpoint
    from diffusette.stages.cache import Cache

    store = Cache(cache)
    store.prepare()
    folder = tmp_path_factory.mktemp("bundles") / "demo"
    conversion = convert_checkpoint("demo", folder, targets=TARGETS, precision="fp16", cache=store)
    assert conversion.ok, [each.parity.failures() for each in conversion.converted if each.parity]
    return folder
