"""What is installed is what the repository holds: no package forgotten, nothing generic leaked."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: Final[dict[str, list[str]]] = PROJECT["project"]["optional-dependencies"]
PACKAGES: Final[list[str]] = PROJECT["tool"]["setuptools"]["packages"]

# Folders that are not part of the package, although Python could take them for one.
OUTSIDE: Final = {"tests", "docs", "benchmarks", "build", "dist"}


def source_folders() -> Iterator[Path]:
    """Folders below the root that hold an `__init__.py`, the root included, relative to it."""
    for folder, below, files in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        below[:] = [name for name in below if not name.startswith(".") and not (here == Path() and name in OUTSIDE)]
        if "__init__.py" in files:
            yield here


def folder_of(package: str) -> Path:
    """`diffusette.runtimes.ort` -> `runtimes/ort`."""
    return Path(*package.split(".")[1:])


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy: a build in the checkout leaves files there that later builds pack."""
    copy = tmp_path_factory.mktemp("wheel") / "checkout"
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "benchmarks", "out")
    shutil.copytree(ROOT, copy, ignore=skipped)
    build = "import setuptools.build_meta as backend; print(backend.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-P", "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(copy / "dist" / done.stdout.splitlines()[-1])


def test_listed_packages_are_the_folders_with_an_init_file() -> None:
    assert sorted(folder_of(package) for package in PACKAGES) == sorted(source_folders())


def test_root_holds_two_modules_because_each_one_there_is_shipped() -> None:
    assert {file.name for file in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_no_folder_of_modules_lacks_its_init_file() -> None:
    with_modules = {
        file.relative_to(ROOT).parent
        for package in PACKAGES
        if package != "diffusette"
        for file in (ROOT / folder_of(package)).rglob("*.py")
    }
    assert with_modules <= set(source_folders())


def shipped_files() -> dict[str, bytes]:
    """Everything below the folders that are shipped, whatever its name, and the root's own."""
    tops = {folder_of(package).parts[0] for package in PACKAGES if package != "diffusette"} | {"demo", "recipes"}
    files = [file for top in tops for file in (ROOT / top).rglob("*") if file.is_file() and file.suffix != ".pyc"]
    files += [ROOT / name for name in ("__init__.py", "__main__.py", "py.typed")]
    return {file.relative_to(ROOT).as_posix(): file.read_bytes() for file in files}


def test_wheel_holds_the_package_its_data_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    found = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = {f"diffusette/{name}": content for name, content in shipped_files().items()}
    assert sorted(found) == sorted(wanted)
    assert found == wanted


def test_what_is_imported_is_what_the_repository_holds() -> None:
    """On the wheel, in `.ci/run`: what is tested in the checkout is then true of what is installed."""
    (place,) = import_module("diffusette").__path__
    wanted = shipped_files()
    found = {name: Path(place, name).read_bytes() for name in wanted if Path(place, name).is_file()}
    assert sorted(found) == sorted(wanted)
    assert found == wanted


def test_every_module_can_be_imported_by_itself() -> None:
    modules = [
        ".".join(("diffusette", *Path(name).with_suffix("").parts)).removesuffix(".__init__")
        for name in shipped_files()
        if name.endswith(".py") and "/" in name
    ]
    assert len(modules) > 150
    alone = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-P", "-c", alone, *modules], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wheel_installs_one_name_and_no_tests(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {"diffusette", next(name for name in top if name.endswith(".dist-info"))}
    assert not [name for name in wheel.namelist() if "test" in name.lower()]


def test_wheel_carries_the_licence_and_the_demo_weights(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    assert [name for name in names if name.startswith("diffusette/demo/unet/") and name.endswith(".safetensors")]


def test_every_imported_distribution_is_a_declared_dependency() -> None:
    shipped = [extra for extra in EXTRAS if extra != "dev"]
    requirements = PROJECT["project"]["dependencies"] + [each for extra in shipped for each in EXTRAS[extra]]
    declared = {normalized(re.split(r"[<>=!~;\[ ]", requirement)[0]) for requirement in requirements}
    owners = packages_distributions()
    undeclared: dict[str, set[str]] = {}
    for package in PACKAGES:
        for file in (ROOT / folder_of(package)).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    modules = [node.module]
                else:
                    continue
                for top in {module.split(".")[0] for module in modules} - sys.stdlib_module_names:
                    if not {normalized(owner) for owner in owners.get(top, [])} & declared:
                        undeclared.setdefault(top, set()).add(str(file.relative_to(ROOT)))
    assert not undeclared


def test_every_dependency_is_pinned_by_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normalized(line.split("==")[0]) for line in lines if "==" in line}
    extras = [name for group in EXTRAS.values() for name in group]
    wanted = {normalized(re.split(r"[<>=!~;\[ ]", name)[0]) for name in PROJECT["project"]["dependencies"] + extras}
    assert wanted - {"diffusette"} <= pinned
    assert not [line for line in lines if "://" in line], "an index or a path of one machine"


def test_public_names_resolve() -> None:
    package = import_module("diffusette")
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'convret'"):
        package.convret  # noqa: B018 - the access is the test


def test_public_names_are_not_names_of_folders() -> None:
    package = import_module("diffusette")
    assert not set(package.__all__) & {folder_of(name).parts[0] for name in PACKAGES if name != "diffusette"}


def test_changelog_speaks_of_this_version() -> None:
    version = import_module("diffusette").__version__
    assert re.search(rf"^## .*\b{re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
