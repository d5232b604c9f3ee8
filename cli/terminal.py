"""Results on stdout, progress and warnings on stderr."""

from __future__ import annotations

import io
import json
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from ..stages.errors import DiffusetteError, ModelError
from ..stages.progress import Silent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDE: Final = 10_000  # columns: wider than any table
_SHORT: Final = 18  # characters of a name that is left in one piece: "vae_encoder (.ort)"
_REDRAW: Final = 0.2  # seconds


class Outlet(io.FileIO):
    """File descriptor of stdout. What it does not take is dropped, so that a command ends with its own exit code."""

    refusal: ModelError | None = None
    _closed = False

    def write(self, data: Any) -> int:
        """As FileIO, but never raises: a reader who went away (`| head`) has seen enough, others get `refusal`."""
        try:
            if not self._closed:
                return super().write(data)
        except BrokenPipeError:
            self._closed = True
        except OSError as error:
            self._closed = True
            what = f"standard output cannot be written: {error.strerror}"
            self.refusal = ModelError(what, hint="free some space, or send the result elsewhere")
        return memoryview(data).nbytes


def take_over_stdout() -> Outlet:
    """Put an `Outlet` below `sys.stdout`, for the rest of this process."""
    before = sys.stdout
    outlet = Outlet(before.fileno(), "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(outlet),
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=outlet.isatty(),
    )
    return outlet


def stdout() -> Console:
    """A console for results; tables keep their columns when piped."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 120)


def print_table(table: Table) -> None:
    """`table` on stdout; where the terminal is too narrow for it, denser and with cells folded, but all of it."""
    from rich import box

    console = stdout()
    wanted = console.measure(table, options=console.options.update(max_width=_WIDE)).maximum
    if console.is_terminal and wanted > console.width:
        table.box, table.padding, table.show_edge, table.pad_edge = box.SIMPLE_HEAD, (0, 0, 0, 0), False, False
        for column in table.columns:
            column.overflow = "fold"
            column.no_wrap = column.no_wrap and max(len(str(cell)) for cell in column.cells) <= _SHORT
    console.print(table)


def print_lines(*lines: str) -> None:
    """Text on stdout, wrapped at words on a terminal and nowhere else; further lines are indented like the first."""
    from rich.padding import Padding
    from rich.text import Text

    console = stdout()
    for line in lines:
        text = line.lstrip(" ")
        if not console.is_terminal or not text:
            print(line)
            continue
        console.print(Padding(Text(text), (0, 0, 0, len(line) - len(text)), expand=False), soft_wrap=False)


def print_json(document: Any) -> None:
    """The one JSON document of a `--json` run. NaN and infinities have no JSON and are refused."""
    print(json.dumps(document, indent=2, allow_nan=False))


def command_line() -> str:
    """What was typed, for a page that says how it came about; the program by its name, not by where it lies."""
    import shlex

    return shlex.join(["diffusette", *sys.argv[1:]])


def warn(text: str) -> None:
    """A line on stderr that the user should read."""
    print(f"warning: {text}", file=sys.stderr)


def show_error(error: DiffusetteError, as_json: bool = False) -> None:
    """What, where, and what to do, on stderr; with `--json` also as the document on stdout."""
    print(f"error: {error.what}", file=sys.stderr)
    if error.hint:
        print(f"  hint: {error.hint}", file=sys.stderr)
    if as_json:
        print_json_error(type(error).__name__, error.what, error.hint, error.exit_code)


def print_json_error(kind: str, what: str, hint: str, exit_code: int) -> None:
    """The one JSON document of a `--json` run that failed."""
    print_json({"ok": False, "error": {"kind": kind, "what": what, "hint": hint, "exit_code": exit_code}})


class TerminalProgress(Silent):
    """Draws stages on stderr: a live line on a terminal, else a line when a stage ends."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__()
        self._live = sys.stderr.isatty() and not quiet
        self._quiet = quiet
        self._drawn = 0.0
        self._part = ""

    def begin(self, label: str) -> None:
        self._part = ""

    def advance(self, part: str, done: int, total: int) -> None:
        self._part = f"{part} {done}/{total}"
        self._drawn = 0.0

    def tick(self, label: str, seconds: float, rss_mib: float) -> None:
        now = time.monotonic()
        if self._live and now - self._drawn >= _REDRAW:
            self._drawn = now
            spin = "|/-\\"[int(seconds * 4) % 4]
            self._write(
                f"\r\x1b[2K{spin} {label:<36} {_clock(seconds):>7}  {_size(rss_mib) if rss_mib else self._part:>9}"
            )

    def end(self, label: str, seconds: float, peak_mib: float, outcome: str) -> None:
        if self._quiet:
            return
        start = "\r\x1b[2K" if self._live else ""
        mark = {"done": "+", "cached": "=", "failed": "x"}[outcome]
        cost = "from the cache" if outcome == "cached" else f"{_clock(seconds):>7}"
        if outcome != "cached" and peak_mib:  # not asked for where many short runs are timed
            cost += f"  {_size(peak_mib):>9}"
        self._write(f"{start}{mark} {label:<36} {cost}\n")

    def say(self, text: str) -> None:
        if not self._quiet:
            self._write(("\r\x1b[2K" if self._live else "") + text + "\n")

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"


def _size(mib: float) -> str:
    return f"{mib / 1024:.1f} GiB" if mib >= 1000 else f"{mib:.0f} MiB"


def size_text(number: float) -> str:
    """A number of bytes as text, in powers of 1000: 1.72 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"
