"""Recipes of strangers: parsed, or refused in the words of the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from diffusette.convert.recipe import load_recipe, parse_recipe, shipped_recipes
from diffusette.stages.errors import RecipeError
from hypothesis import example, given

from .guard import answer
from .hostile import cases, edited, nested, scratched

FULL = {
    "schema": 1,
    "model": {"family": "sd1"},
    "export": {"size": [512, 512]},
    "quantize": {"precision": "fp16", "rules": [{"match": "unet/.*", "scheme": "fp32", "why": "a test"}]},
    "target": {"name": "ort", "ort": {"forms": ["onnx"]}},
    "schedule": {"default": "ddim", "steps": 20, "also": [{"name": "euler", "steps": [10, 20]}]},
    "guidance": {"default": 7.5},
    "validate": {"plan": "auto"},
}
TEXT = shipped_recipes()["demo"].read_bytes()


def test_the_recipe_that_is_changed_below_is_whole(tmp_path: Path) -> None:
    assert answer(lambda: parse_recipe(tomli_w.dumps(FULL), "full.toml"), tmp_path) is None


@cases(400)
@given(document=edited(FULL))
def test_recipes_of_any_content(document: Any, tmp_path: Path) -> None:
    try:
        text = tomli_w.dumps(document)
    except (TypeError, ValueError, AttributeError):  # a null, a key that is no text: no TOML says it
        return
    answer(lambda: parse_recipe(text, "x.toml"), tmp_path)


@cases(300)
@given(content=scratched(TEXT))
@example(content=b"schema = 1\nx = " + nested(10**5).encode())
@example(content=b"schema = 1\nx = " + nested(300).encode())
@example(content=b"schema = 1\nx = " + nested(10**4, "{a=", "}").encode())
@example(content=b"schema = " + b"9" * 10**5)
@example(content=b"schema = 1\n" + b".".join([b"a"] * 10**4) + b" = 1")
@example(content=b"[" + b".".join([b"a"] * 10**4) + b"]\n")
@example(content=b"schema = 1979-05-27T07:32:00Z\n")
@example(content=b"schema = inf\n")
@example(content=b"schema = 1\n[[quantize.rules]]\nmatch = 'a{99999999999}'\nscheme = 'fp32'\n")
@example(content=b"schema = 1\n[[quantize.rules]]\nmatch = '" + b"(" * 10**4 + b"'\nscheme = 'fp32'\n")
@example(content=b"schema = 1\n[[quantize.rules]]\nmatch = '" + b"(" * 999 + b")" * 999 + b"'\nscheme = 'fp32'\n")
@example(content=b"schema = 1\n[quantize]\nprecision = 'w" + b"9" * 5000 + b"c_afp'\n")
@example(content=b"schema = 1\n[quantize]\nprecision = 'w8g" + b"9" * 5000 + b"_afp'\n")
def test_files_of_any_bytes(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(content)
    answer(lambda: load_recipe(file), tmp_path)


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/tty", "/proc/self/mem", "pipe.toml", "holes.toml", "folder.toml"])
def test_only_a_small_plain_file_is_a_recipe(place: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "holes.toml").touch()
    os.truncate(tmp_path / "holes.toml", 2**43)
    assert isinstance(answer(lambda: load_recipe(tmp_path / place), tmp_path), RecipeError)


@pytest.mark.parametrize("pattern", ["unet/(a|a)*b?c", "(.*)*x", "unet/((.+)+)+=", "(.|.)+:", r"(?:[\w./]*)*[?]"])
def test_no_pattern_holds_a_conversion_up(pattern: str, tmp_path: Path) -> None:
    text = tomli_w.dumps({"schema": 1, "quantize": {"rules": [{"match": pattern, "scheme": "fp32"}]}})
    parameters = {"unet": {f"{'a' * 60}.weight": (8, 8)}}
    error = answer(lambda: parse_recipe(text, "x.toml").plans(parameters), tmp_path)
    assert isinstance(error, RecipeError)
    assert ("still undecided" if "a|a" in pattern else "matches nothing") in error.what
