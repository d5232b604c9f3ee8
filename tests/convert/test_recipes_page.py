"""docs/recipes.md says what a recipe may hold, all of it, and shows only what is valid."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from diffusette.convert.recipe import Recipe, parse_recipe, shipped_recipes
from pydantic import BaseModel

DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"


def keys(model: type[BaseModel], table: str = "") -> Iterator[str]:
    """`[export] size`, in the way of docs/recipes.md."""
    for name, field in model.model_fields.items():
        key = field.alias or name
        inner = [kind for kind in (field.annotation, *get_args(field.annotation)) if hasattr(kind, "model_fields")]
        if not inner or key == "also":
            yield f"[{table}] {key}" if table else key
        else:
            below = f"{table}.{key}" if table else key
            for found in keys(inner[0], below):
                yield f"[{found.replace('] ', ']] ', 1)}" if key == "rules" else found


def test_the_page_about_recipes_lists_every_key_and_no_other() -> None:
    listed = re.findall(r"^\| `([^`]*)` \|", DOCS.read_text().split("## Keys")[1], flags=re.MULTILINE)
    assert listed == list(keys(Recipe))


def test_the_page_about_recipes_lists_every_shipped_recipe() -> None:
    listed = re.findall(r"^\| `([^`]*)` \|", DOCS.read_text().split("## Keys")[0], flags=re.MULTILINE)
    assert sorted(listed) == list(shipped_recipes())


@pytest.mark.parametrize("block", re.findall(r"```toml\n(.*?)```", DOCS.read_text(), flags=re.DOTALL))
def test_recipes_in_the_docs_are_valid(block: str) -> None:
    assert parse_recipe(block, "docs/recipes.md").to_toml() == block
