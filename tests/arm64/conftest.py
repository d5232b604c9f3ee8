"""The demo's bundles on an emulated AArch64 processor. Skipped, with the reason, where no machine is set up."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusette.bundle.bundle import Bundle, open_bundle
from diffusette.convert.convert import convert_checkpoint
from diffusette.runtimes.machines.machine import Machine
from diffusette.runtimes.machines.registry import machine_named
from diffusette.stages.cache import Cache
from diffusette.stages.errors import MissingTool, UsageError


def machine(name: str) -> Machine:
    """The machine of that name, or a skip that says how to have it."""
    try:
        return machine_named(name)
    except (MissingTool, UsageError) as error:
        pytest.skip(f"{error.what}; {error.hint}")


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    machine("arm64")
    cache = Cache(tmp_path_factory.mktemp("arm64-cache"))
    cache.prepare()
    return cache


@pytest.fixture(scope="session")
def demo_bundles(demo_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Bundle]:
    """(precision, target) -> the bundle, converted on first use."""

    class Made(dict[tuple[str, str], Bundle]):
        def __missing__(self, wanted: tuple[str, str]) -> Bundle:
            precision, target = wanted
            place = Path(tmp_path_factory.mktemp("arm64")) / "bundle"
            convert_checkpoint("demo", place, precision=precision, targets=(target,), goldens=True, cache=demo_cache)
            self[wanted] = open_bundle(place)
            return self[wanted]

    return Made()
