"""The command line: one file a command. Only this folder prints, and only this folder exits."""

from __future__ import annotations

import sys
from typing import Any

from ..pipeline.errors import DiffusetteError

BUG = 70  # sysexits.h EX_SOFTWARE
INTERRUPTED = 130  # 128 + SIGINT, as shells count


def main() -> None:
    """Entry point of `diffusette`: run a command, turn what it raised into a message and an exit code."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Run the command line `argv` and return its exit code."""
    from typer import Abort, Exit
    from typer.exceptions import TyperException

    from .app import app
    from .terminal import show_error

    wants_json = "--json" in argv
    try:
        result: Any = app(argv, prog_name="diffusette", standalone_mode=False)
    except DiffusetteError as error:
        show_error(error, wants_json)
        return error.exit_code
    except TyperException as error:
        show: Any = getattr(error, "show", print)  # knows the command's usage line
        show(sys.stderr)
        return error.exit_code
    except Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, Abort):
        print("stopped; finished stages are kept, run the same command again to continue", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away (`| head`): nothing is left to say to it
        return 0
    except Exception:  # noqa: BLE001 - what nobody foresaw is a bug of ours, and is told as one
        import traceback

        traceback.print_exc()
        print("\nthis is a bug in diffusette: please report it with the lines above", file=sys.stderr)
        return BUG
    return result if isinstance(result, int) else 0
