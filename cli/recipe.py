"""diffusette recipe list|show|check."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Json

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
Name = Annotated[str, typer.Argument(help="A shipped recipe's name, or a TOML file.", show_default=False)]


@app.command("list")
def list_(as_json: Json = False) -> int:
    """List the recipes that come with diffusette."""
    from ..pipeline.recipe import load_recipe, shipped_recipes
    from .terminal import print_json

    rows = []
    for name in shipped_recipes():
        first = next((line for line in load_recipe(name).to_toml().splitlines() if line.startswith("#")), "#")
        rows.append({"name": name, "about": first.removeprefix("#").strip()})
    if as_json:
        print_json({"recipes": rows})
    else:
        for row in rows:
            print(f"{row['name']:<18} {row['about']}")
    return 0


@app.command("show")
def show(name: Name) -> int:
    """Print a recipe."""
    from ..pipeline.recipe import load_recipe

    print(load_recipe(name).to_toml(), end="")
    return 0


@app.command("check")
def check(name: Name, as_json: Json = False) -> int:
    """Check that a recipe can be followed. Exits with 2 and the place when it cannot."""
    from ..pipeline.recipe import load_recipe
    from .terminal import print_json

    recipe = load_recipe(name)
    if as_json:
        print_json({"ok": True, "recipe": recipe.model_dump(mode="json", by_alias=True)})
    else:
        print(f"{name}: ok")
    return 0
