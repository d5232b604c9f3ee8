"""All commands, in the order in which a user meets them."""

from __future__ import annotations

import typer

from . import (
    cache,
    check_goldens,
    compare,
    convert,
    demo,
    generate,
    inspect,
    profile,
    recipe,
    targets,
    validate,
    verify,
)

app = typer.Typer(
    help="Turn a Stable Diffusion checkpoint into models for phones, and prove that they still compute the same.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("convert")(convert.convert)
app.command("validate")(validate.validate)
app.command("profile")(profile.profile)
app.command("generate")(generate.generate)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("compare")(compare.compare)
app.command("check-goldens")(check_goldens.check_goldens)
app.command("targets")(targets.targets)
app.add_typer(recipe.app, name="recipe", help="List, show or check recipes.")
app.add_typer(cache.app, name="cache", help="List, verify or prune the store of finished stages.")
app.command("demo")(demo.demo)


@app.callback(invoke_without_command=True)
def version(show: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if show:
        from .. import __version__

        print(f"diffusette {__version__}")
        raise typer.Exit
