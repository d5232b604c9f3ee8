"""diffusette recipe list|show|check."""

from __future__ import annotations

from typing import Annotated

import typer

from ..stages.extras import require_converter
from .options import Json

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, callback=lambda: require_converter("reading recipes"))
Name = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a TOML file.", show_default=False)
]


@app.command("list")
def list_(as_json: Json = False) -> int:
    """List the recipes that come with diffusette."""
    from ..convert.recipe import load_recipe, shipped_recipes
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
    from ..convert.recipe import load_recipe

    print(load_recipe(name).to_toml(), end="")
    return 0


@app.command("check")
def check(
    name: Name,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint", metavar="CHECKPOINT", help="Compare its rules with the modules of this checkpoint."
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Check a recipe. Exits with 2 when it is wrong, and says where."""
    from ..convert.recipe import load_recipe, parameters_of
    from .terminal import print_json

    recipe = load_recipe(name)
    precisions: dict[str, str] = {}
    if checkpoint is not None:
        from ..checkpoints.checkpoint import open_checkpoint

        source = open_checkpoint(checkpoint, survey=False)
        recipe.check_family(source)
        precisions = {part: plan.label for part, plan in recipe.plans(parameters_of(source)).items()}
    if as_json:
        print_json({"ok": True, "recipe": recipe.model_dump(mode="json", by_alias=True), "precisions": precisions})
        return 0
    print(f"{name}: ok")
    for part, precision in precisions.items():
        print(f"  {part:<14} {precision}")
    return 0
