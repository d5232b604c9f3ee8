"""The command line: one file a command. Only this folder prints, and only this folder exits."""

from __future__ import annotations

import sys
from typing import Any

from ..stages.errors import DiffusetteError

BUG = 70  # sysexits.h EX_SOFTWARE
INTERRUPTED = 130  # 128 + SIGINT, as shells count


def main() -> None:
    """Entry point of `diffusette`: run a command, turn what it raised into a message and an exit code."""
    if sys.stdout is None:  # closed by the shell: `>&-`
        sys.exit(run(sys.argv[1:]))
    from .terminal import show_error, take_over_stdout

    outlet = take_over_stdout()
    code = run(sys.argv[1:])
    sys.stdout.flush()
    if outlet.refusal:
        show_error(outlet.refusal)
        code = code or outlet.refusal.exit_code
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run the command line `argv` and return its exit code."""
    from typer import Abort, Exit
    from typer.exceptions import TyperException

    from .app import app
    from .terminal import print_json_error, show_error

    wants_json = "--json" in argv
    try:
        result: Any = app(argv, prog_name="diffusette", standalone_mode=False)
    except DiffusetteError as error:
        show_error(error, wants_json)
        return error.exit_code
    except TyperException as error:
        show: Any = getattr(error, "show", print)  # knows the command's usage line
        show(sys.stderr)
        if wants_json:
            print_json_error("UsageError", error.format_message(), "see --help", error.exit_code)
        return error.exit_code
    except Exit as error:
        return _ended(error.exit_code)
    except (KeyboardInterrupt, Abort):
        return _ended(INTERRUPTED)
    except SystemExit as ended:  # typer raises it when stderr is closed
        return ended.code if isinstance(ended.code, int) else 1
    except Exception as error:  # noqa: BLE001 - an unforeseen exception is a bug of ours, and is reported as one
        import traceback

        traceback.print_exc()
        hint = "this is a bug in diffusette: please report it"
        print(f"\n{hint} with the lines above", file=sys.stderr)
        if wants_json:
            print_json_error(type(error).__name__, str(error), hint, BUG)
        return BUG
    return _ended(result if isinstance(result, int) else 0)


def _ended(code: int) -> int:
    """`code`; after Ctrl-C, which typer turns into an exit code, with a line on stderr."""
    if code == INTERRUPTED:
        print("stopped; finished stages are kept, run the same command again to continue", file=sys.stderr)
    return code
