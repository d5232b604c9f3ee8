"""The machine has what a light install has: bundles are drawn with, checked and measured on the processor itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from diffusette.bundle.bundle import Bundle
from diffusette.bundle.draw import draw_with_bundle
from diffusette.stages.progress import Silent

from ..light import HEAVY
from .conftest import machine

PROMPT = "a large red star in the center, on a blue background"


def there(folder: Path, *words: object, python: tuple[str, ...] = ("-m", "diffusette")) -> Any:
    """Run `diffusette` on the processor; its JSON, or what else `python` prints."""
    where = machine("arm64")
    environment = where.environment_of({**os.environ, "DIFFUSETTE_CACHE": str(folder / "cache")})
    done = subprocess.run(
        [*where.python, "-P", *python, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
    return json.loads(done.stdout) if "--json" in words else done.stdout


def test_nothing_of_the_converter_is_there(tmp_path: Path) -> None:
    program = "import sys; from importlib.util import find_spec; print(*filter(find_spec, sys.argv[1:]))"
    assert there(tmp_path, *HEAVY, python=("-c", program)).strip() == ""


@pytest.mark.arm64_long
@pytest.mark.parametrize("target", ["ncnn", "mnn", "ort"])
def test_a_light_install_does_there_what_it_does_here(
    target: str, demo_bundles: dict[tuple[str, str], Bundle], tmp_path: Path
) -> None:
    bundle = demo_bundles["fp16", target]
    assert there(tmp_path, "verify", bundle.path, "--json")["ok"]
    assert there(tmp_path, "inspect", bundle.path, "--json")["target"]["name"] == target
    drawn = there(tmp_path, "generate", bundle.path, PROMPT, "--steps", 10, "-o", "star.png", "--json")
    here = draw_with_bundle(bundle, PROMPT, steps=10, progress=Silent())
    assert drawn["size"] == list(here.image.shape[:2])
    assert (tmp_path / "star.png").is_file()
    assert there(tmp_path, "check-goldens", bundle.path, "--json")["ok"]
    assert there(tmp_path, "profile", bundle.path, "--runs", 1, "--json")
    assert there(tmp_path, "compare", bundle.path, bundle.path, "--no-image", "--no-speed", "--json")["ok"]
