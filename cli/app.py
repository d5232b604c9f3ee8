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
    machine,
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
app.command("convert", short_help="Convert a checkpoint for phones, and prove it.")(convert.convert)
app.command("validate", short_help="Compare a bundle with PyTorch.")(validate.validate)
app.command("profile", short_help="Measure speed and memory, next to PyTorch.")(profile.profile)
app.command("generate", short_help="Draw a picture from a bundle alone.")(generate.generate)
app.command("inspect", short_help="Say what a file is, and what its conversion needs.")(inspect.inspect)
app.command("verify", short_help="Check every hash of a bundle.")(verify.verify)
app.command("compare", short_help="Compare two bundles with each other.")(compare.compare)
app.command("check-goldens", short_help="Replay a bundle's golden vectors.")(check_goldens.check_goldens)
app.command("targets", short_help="List the runtimes, and what each can run.")(targets.targets)
app.add_typer(recipe.app, name="recipe", help="List, show or check recipes.")
app.add_typer(cache.app, name="cache", help="List, verify or prune the cache of finished work.")
app.add_typer(machine.app, name="machine", help="Set up or list the processors that bundles can be run on.")
app.command("demo", short_help="The whole tour, with the embedded checkpoint.")(demo.demo)


@app.callback(invoke_without_command=True)
def version(show: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if show:
        from .. import __version__

        print(f"diffusette {__version__}")
        raise typer.Exit
