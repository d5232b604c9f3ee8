"""A light install runs bundles, is small, and says what it lacks: in an environment that has nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Final

import pytest
from diffusette.runtimes.registry import TARGETS as RUNTIMES
from diffusette.stages.extras import CONVERTER
from packaging.requirements import Requirement

from ..light import HEAVY, ROOT, closure, installed_bytes, light_python
from .conftest import TARGETS

Done = subprocess.CompletedProcess[str]
Light = Callable[..., Done]
pytestmark = pytest.mark.slow  # each command starts Pythons of its own

PROMPT: Final = "a large red star in the center, on a blue background"
# MiB of diffusette with one runtime. Seen: 218, 174, 200; a package more shows.
BOUND: Final = {"ort": 235, "ncnn": 190, "mnn": 215}
HINT: Final = "hint: pip install 'diffusette[convert]'"


@pytest.fixture(scope="session")
def pythons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Python with each runtime, and one with none."""
    root = tmp_path_factory.mktemp("light")
    return {extra: light_python(extra, root / (extra or "none")) for extra in ("", *TARGETS)}


@pytest.fixture
def light(pythons: dict[str, Path], tmp_path: Path) -> Light:
    """Run `diffusette` in the environment of a runtime."""

    def call(extra: str, *words: object) -> Done:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        argv = [str(pythons[extra]), "-P", "-m", "diffusette", *map(str, words)]
        env = {**clean, "DIFFUSETTE_CACHE": str(tmp_path / "cache")}
        return subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)

    return call


@pytest.mark.parametrize("target", TARGETS)
def test_it_is_small(target: str) -> None:
    assert installed_bytes(target) / 2**20 < BOUND[target]


@pytest.mark.parametrize("extra", ["", *TARGETS])
def test_nothing_of_the_converter_can_be_imported_there(pythons: dict[str, Path], extra: str) -> None:
    program = "import sys; from importlib.util import find_spec; print(*filter(find_spec, sys.argv[1:]))"
    others = {"ort": "onnxruntime", "ncnn": "ncnn", "mnn": "MNN"}
    absent = [*HEAVY, *(module for name, module in others.items() if name != extra)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([pythons[extra], "-P", "-c", program, *absent], capture_output=True, text=True, env=clean)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr
    assert not {"torch", "onnx", "pnnx", "scipy"} & set(closure(extra))


def test_the_converters_modules_are_those_of_the_extra() -> None:
    """What `require_converter` looks for is what `[convert]` adds, besides runtimes."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    added = {Requirement(text).name for text in extras["convert"]} - {"diffusette", "protobuf", "pnnx"}
    named = {"PyYAML": "yaml", "scikit-image": "skimage"}
    assert {named.get(name, name.replace("-", "_").lower()) for name in added} == set(CONVERTER)
    assert set(RUNTIMES) == set(extras) - {"convert", "dev"}
    assert all(distribution(name) for name in added)


def test_the_bundle_is_drawn_checked_measured_and_compared(light: Light, converted: Path) -> None:
    """Each runtime by itself. Pictures are those of the whole environment, so nothing is missed silently."""
    for target in TARGETS:
        bundle = converted / target
        done = light(target, "generate", bundle, PROMPT, "--steps", 10, "-o", f"{target}.png", "--json")
        assert done.returncode == 0, done.stderr
        here = draw_here(bundle)
        assert json.loads(done.stdout)["sha256_of_float_image"] == here, target
        for words in (
            ("verify", bundle, "--json"),
            ("inspect", bundle, "--json"),
            ("profile", bundle, "--runs", 1, "--json"),
            ("profile", bundle, "--runs", 1, "--ops", "--json"),
        ):
            done = light(target, *words)
            assert done.returncode == 0, (words, done.stderr)
            assert json.loads(done.stdout)


def draw_here(bundle: Path) -> Any:
    from diffusette.bundle.bundle import open_bundle
    from diffusette.bundle.draw import draw_with_bundle

    drawing = draw_with_bundle(open_bundle(bundle), PROMPT, steps=10)
    import hashlib

    return hashlib.sha256(drawing.image.tobytes()).hexdigest()


@pytest.mark.parametrize("target", TARGETS)
def test_goldens_hold_and_bundles_compare_there(
    light: Light, converted: Path, cache: Path, target: str, tmp_path: Path
) -> None:
    from diffusette.convert.convert import convert_checkpoint
    from diffusette.stages.cache import Cache

    folder = tmp_path / "goldens"
    assert convert_checkpoint("demo", folder, targets=(target,), precision="fp16", goldens=True, cache=Cache(cache)).ok
    done = light(target, "check-goldens", folder, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"] is True
    done = light(target, "compare", converted / target, folder, "--image", "--no-speed", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(picture["ssim"] == 1.0 for picture in json.loads(done.stdout)["image"]["pictures"])


def test_what_needs_the_converter_says_so_at_once(light: Light, converted: Path) -> None:
    bundle = converted / "ort"
    for words in (
        ("convert", "demo", "-o", "out"),
        ("validate", bundle),
        ("demo", "-o", "out"),
        ("inspect", "demo"),
        ("inspect", "model.safetensors"),
        ("inspect", bundle / "unet" / "model.onnx"),
        ("profile", bundle, "--vs", "torch"),
        ("profile", bundle, "--ops", "--reference", "demo"),
        ("compare", bundle, bundle, "--html", "page.html"),
        ("recipe", "list"),
        ("recipe", "show", "default"),
        ("recipe", "check", "default"),
    ):
        done = light("ort", *words)
        assert (done.returncode, done.stdout) == (3, ""), (words, done.stderr)
        assert "needs the package torch and " in done.stderr, words
        assert HINT in done.stderr, words
        assert "Traceback" not in done.stderr, words


def test_another_bundles_runtime_is_named_with_its_extra(light: Light, converted: Path) -> None:
    for target in TARGETS:
        for words in (("generate", converted / target, "a star"), ("profile", converted / target)):
            done = light("", *words)
            assert done.returncode == 3, done.stderr
            assert f"hint: pip install 'diffusette[{target}]'" in done.stderr
        assert light("", "inspect", converted / target, "--json").returncode == 0
        assert light("", "verify", converted / target).returncode == 0


def test_what_asks_nobody_works_everywhere(light: Light) -> None:
    assert light("", "--help").returncode == 0
    rows = json.loads(light("ncnn", "targets", "--json").stdout)["targets"]
    assert {row["name"]: bool(row["version"]) for row in rows} == {"ort": False, "ncnn": True, "mnn": False}
    assert json.loads(light("", "cache", "ls", "--json").stdout)
