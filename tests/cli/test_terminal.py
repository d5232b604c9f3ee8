"""What a narrow terminal shows is all that there is, and no line of it is cut."""

from __future__ import annotations

import io
import re

import pytest
from diffusette.cli import terminal
from rich.console import Console
from rich.table import Table

WIDTH = 80
CELLS = (
    "down_blocks.1.attentions.0.to_k",
    "w4g64_afp",
    "4.55e-03",
    "1.00000 SSIM",
    "45",
    "113.0",
    "95",
    "PARITY FAILED",
)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 80 columns in the place of stdout."""
    screen = io.StringIO()
    console = Console(file=screen, width=WIDTH, force_terminal=True, no_color=True, highlight=False)
    monkeypatch.setattr(terminal, "stdout", lambda: console)
    return screen


def plain(screen: io.StringIO) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()).splitlines()


def wide_table() -> Table:
    table = Table(title="ort against PyTorch", title_justify="left")
    for number, _ in enumerate(CELLS):
        table.add_column(f"heading {number}", no_wrap=not number)
    table.add_row(*CELLS)
    return table


def test_a_table_that_is_too_wide_is_folded_and_not_cut(shown: io.StringIO) -> None:
    terminal.print_table(wide_table())
    lines = plain(shown)
    assert max(map(len, lines)) <= WIDTH
    assert "…" not in shown.getvalue()
    letters = re.sub(r"\W", "", "".join(lines))
    assert sorted(re.sub(r"\W", "", "".join(CELLS))) == sorted(re.sub(r"heading\d|ortagainstPyTorch", "", letters))


def test_a_table_that_fits_keeps_its_frame(shown: io.StringIO) -> None:
    table = Table("a", "b")
    table.add_row("1", "2")
    terminal.print_table(table)
    assert "│ 1 │ 2 │" in plain(shown)


def test_lines_break_between_words_and_keep_their_indent(shown: io.StringIO) -> None:
    said = "  " + " ".join(f"word{number}" for number in range(30))
    terminal.print_lines("title", said)
    first, *rest = plain(shown)
    assert first == "title"
    assert len(rest) > 2
    assert all(line.startswith("  word") and len(line) <= WIDTH for line in rest)
    assert " ".join(line.strip() for line in rest) == said.strip()


def test_piped_lines_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    said = "  " + "word " * 60 + "end"
    terminal.print_lines(said)
    assert capsys.readouterr().out == f"{said}\n"
