"""What `pip install 'diffusette[RUNTIME]'` brings, and a Python that has nothing else.

The distributions are those of pyproject.toml and what they require in turn; their files are borrowed from the
environment that runs the tests, so no network is needed. Another machine's (an emulated one) take the pins.
"""

from __future__ import annotations

import sysconfig
import tomllib
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Final

import diffusette
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from .test_imports import ROOMS

ROOT: Final = Path(__file__).resolve().parents[1]
PACKAGE: Final = Path(diffusette.__file__).resolve().parent  # of the checkout, or of the wheel
HEAVY: Final = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxsim", "pnnx", "scipy",
                "skimage", "jinja2", "matplotlib", "ml_dtypes", "regex", "safetensors", "tomli_w")  # fmt: skip


def closure(extra: str) -> dict[NormalizedName, Distribution]:
    """Name -> distribution of everything that pip installs for `diffusette[extra]`; "": for no extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else ())]
    found: dict[NormalizedName, Distribution] = {}
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        found[name] = distribution(requirement.name)
        for text in found[name].requires or ():
            marker = Requirement(text).marker
            if marker is None or any(marker.evaluate({"extra": each}) for each in ("", *requirement.extras)):
                waiting.append(text)
    return found


def pins(extra: str) -> list[str]:
    """`NAME==VERSION` of each, for another machine's pip."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pinned = {canonicalize_name(line.partition("==")[0]): line for line in lines}
    return sorted(pinned[name] for name in closure(extra))


def light_python(extra: str, folder: Path) -> Path:
    """Make an environment in `folder` that has diffusette with `extra` and nothing else; return its Python."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    (site / "diffusette").symlink_to(PACKAGE)
    for each in closure(extra).values():
        for top in {file.parts[0] for file in each.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(each.locate_file(top))).resolve())
    return python


def installed_bytes(extra: str) -> int:
    """What pip puts on a disk for `diffusette[extra]`, diffusette itself included, without compiled bytecode."""
    files = [Path(str(file.locate())) for each in closure(extra).values() for file in each.files or ()]
    tops = ("demo", "recipes", *ROOMS)
    files += [file for top in tops for file in (PACKAGE / top).rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file() and file.suffix != ".pyc")
