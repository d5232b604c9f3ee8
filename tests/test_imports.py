"""The arrows between the folders point one way, and heavy packages are loaded only when work is done."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]

# From the roof to the ground: a room imports what stands below it, and itself.
ROOMS: Final = (
    "cli", "convert", "validate", "bundle", "runtimes", "quantize", "export", "checkpoints", "stages",
)  # fmt: skip

# Seconds to load, or native code that can end the process: imported inside the function that needs them.
HEAVY: Final = {
    "MNN", "_tools", "accelerate", "diffusers", "ncnn", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "onnxsim",
    "optimum", "peft", "pnnx", "torch", "transformers",
}  # fmt: skip

# Tenths of a second: a module may load them, `diffusette --help` may not.
SLOW: Final = {"jinja2", "matplotlib", "scipy", "skimage"}


@dataclass(frozen=True)
class Import:
    """One import: who, what (`export.graph` for our own), and whether it happens when the module is loaded."""

    importer: str
    imported: str
    own: bool
    at_load: bool
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules() -> dict[str, Path]:
    """Name below the package (`runtimes.ort`) -> file, for all that is shipped except the root's two modules."""
    found = {}
    for top in ROOMS:
        for file in sorted((ROOT / top).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES: Final = modules()


def only_for_types(node: ast.If) -> bool:
    test = node.test
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def statements(node: ast.AST, at_load: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements below `node`, and whether they run when the module is loaded; those for types do not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_load
        elif isinstance(child, ast.If) and only_for_types(child):
            yield from statements(ast.Module(child.body, []), at_load=False)
            yield from statements(ast.Module(child.orelse, []), at_load)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from statements(child, at_load and not inside)


def own_name(importer: str, node: ast.ImportFrom) -> str:
    """The module below the package that a relative import names: in `runtimes.ort.adapter`, `..protocol`."""
    is_package = MODULES[importer].name == "__init__.py"
    levels = node.level - (1 if is_package else 0)
    parts = importer.split(".")
    if levels > len(parts):
        raise AssertionError(f"{importer}:{node.lineno} climbs out of the package")
    base = parts[: len(parts) - levels]
    return ".".join([*base, *(node.module or "").split(".")]).strip(".")


def imports_of(importer: str) -> Iterator[Import]:
    for node, at_load in statements(ast.parse(MODULES[importer].read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                own = alias.name.split(".")[0] == "diffusette"
                yield Import(importer, alias.name.removeprefix("diffusette."), own, at_load, node.lineno)
        elif node.level == 0:
            module = node.module or ""
            own = module.split(".")[0] == "diffusette"
            yield Import(importer, module.removeprefix("diffusette."), own, at_load, node.lineno)
        else:
            base = own_name(importer, node)
            for alias in node.names:  # `from ..pipeline import stage` names a module, `from .a import b` a thing in one
                inner = f"{base}.{alias.name}".strip(".")
                yield Import(importer, inner if inner in MODULES else base, True, at_load, node.lineno)


IMPORTS: Final = [found for importer in MODULES for found in imports_of(importer)]


def room_of(module: str) -> str:
    return module.split(".")[0]


def climbs(found: Import) -> bool:
    """Whether an import goes up. The root, with the version and the public names, belongs to nobody."""
    above = ROOMS[: ROOMS.index(room_of(found.importer))]
    return found.own and room_of(found.imported) in above


def test_the_walk_sees_the_modules() -> None:
    assert {room_of(name) for name in MODULES} == set(ROOMS)
    assert any(found.importer == "runtimes.protocol" and found.imported == "stages.artifacts" for found in IMPORTS)
    assert climbs(Import("stages.stage", "cli.convert", own=True, at_load=False, line=1))


def test_arrows_between_the_rooms_point_down() -> None:
    assert not [str(found) for found in IMPORTS if climbs(found)]


def test_no_module_imports_in_a_circle() -> None:
    """Not in functions, and not for types either."""
    below = {name: {found.imported for found in IMPORTS if found.importer == name} & MODULES.keys() for name in MODULES}
    TopologicalSorter(below).prepare()  # raises a CycleError that names the circle


def test_heavy_packages_are_imported_inside_functions() -> None:
    offenders = [
        str(found) for found in IMPORTS if found.at_load and not found.own and found.imported.split(".")[0] in HEAVY
    ]
    assert not offenders


def loaded_by(names: list[str]) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after importing `names`."""
    code = "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *names],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONSTARTUP": ""},
    )
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("name", ["diffusette", "diffusette.cli"])
def test_the_command_line_starts_without_a_heavy_package(name: str) -> None:
    assert not loaded_by([name]) & (HEAVY | SLOW)


def test_no_module_loads_a_heavy_package_through_another() -> None:
    names = [f"diffusette.{name}" for name in MODULES]
    assert not loaded_by(names) & HEAVY
