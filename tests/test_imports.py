"""The arrows between the folders point one way, and heavy packages are loaded only when work is done."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]

# Seconds to load, or native code that can end the process: imported inside the function that needs them.
HEAVY: Final = {
    "MNN", "_tools", "accelerate", "diffusers", "ncnn", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "onnxsim",
    "optimum", "peft", "pnnx", "torch", "transformers",
}  # fmt: skip

# Tenths of a second: a module may load them, `diffusette --help` may not.
SLOW: Final = {"jinja2", "matplotlib", "scipy", "skimage"}

# Modules that are themselves imported inside functions only, because a class in them has a heavy base.
CHILD_ONLY: Final[dict[str, str]] = {}


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
    for top in ("cli", "export", "pipeline", "quantize", "runtimes", "validate"):
        for file in sorted((ROOT / top).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES: Final = modules()

# The part of pipeline/ that every folder stands on, and that stands on nothing. The rest of pipeline/ conducts.
SPINE: Final = {
    f"pipeline.{name}"
    for name in (
        "artifacts", "cache", "cache_object", "child", "disk", "errors", "extras", "hashing", "last_words", "limits",
        "onnx_file", "plain_file", "progress", "publish", "safe_path", "schedule", "stage", "strict", "warm", "wire",
    )
}  # fmt: skip

# What weights are stored as, in words and numbers: `export/` and `runtimes/` speak of it too.
NOTATION: Final = {
    f"quantize.{name}" for name in ("cast", "codes", "layer_ranges", "low_rank", "plan", "samples", "scheme")
}

# Who may import what; a name covers what is below it, and the longest name that covers a module is its rule.
# cli -> pipeline.convert -> export, quantize, runtimes, validate -> spine
ALLOWED: Final[dict[str, set[str]]] = {
    **dict.fromkeys(SPINE, SPINE),
    "export": {"export", "quantize", *SPINE},
    "quantize": {"quantize", "export", *SPINE},  # it streams a component's weights
    **{name: {*NOTATION, *SPINE} for name in NOTATION},
    "runtimes": {"runtimes", "export", "quantize", *SPINE},
    "validate": {"validate", "runtimes", "export", "quantize", *SPINE},
    "pipeline": {"pipeline", "export", "quantize", "runtimes", "validate"},
    "cli": {"cli", "pipeline", "export", "quantize", "runtimes", "validate"},
}


def only_for_types(node: ast.If) -> bool:
    test = node.test
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def statements(node: ast.AST, at_load: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements below `node`, and whether they run when the module is loaded. Not those for types only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_load
        elif isinstance(child, ast.If) and only_for_types(child):
            for otherwise in child.orelse:
                yield from statements(otherwise, at_load)
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


def covers(prefix: str, module: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def may_import(importer: str, imported: str) -> bool:
    rule = max((name for name in ALLOWED if covers(name, importer)), key=len)
    is_root = imported in ("", "diffusette")  # the version, and the public names
    return is_root or any(covers(name, imported) for name in ALLOWED[rule])


def test_the_walk_sees_the_modules() -> None:
    assert {*SPINE, "runtimes.protocol"} <= set(MODULES)
    assert any(found.importer == "runtimes.protocol" and found.imported == "pipeline.artifacts" for found in IMPORTS)


def test_folders_import_one_way() -> None:
    assert not [str(found) for found in IMPORTS if found.own and not may_import(found.importer, found.imported)]


def test_export_never_reaches_the_runtimes() -> None:
    """Implied by the table above; said once more because a change of the table must not lose it."""
    assert not may_import("export.onnx_model", "runtimes.ort.adapter")
    assert not [str(found) for found in IMPORTS if covers("export", found.importer) and "runtimes" in found.imported]


def test_heavy_packages_are_imported_inside_functions() -> None:
    offenders = [
        str(found)
        for found in IMPORTS
        if found.at_load and not found.own and found.imported.split(".")[0] in HEAVY
        if found.importer not in CHILD_ONLY
    ]
    assert not offenders


def test_runtimes_and_validate_never_import_torch_at_load() -> None:
    assert not [name for name in CHILD_ONLY if covers("runtimes", name) or covers("validate", name)]


def test_child_only_modules_exist_and_are_imported_inside_functions() -> None:
    assert set(CHILD_ONLY) <= set(MODULES)
    offenders = [
        str(found)
        for found in IMPORTS
        if found.own and found.at_load and found.imported in CHILD_ONLY and found.importer not in CHILD_ONLY
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
    names = [f"diffusette.{name}" for name in MODULES if name not in CHILD_ONLY]
    assert not loaded_by(names) & HEAVY
