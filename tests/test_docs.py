"""What the pages point at is there: files, headings, modules, decisions, keys of a manifest."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from diffusette.bundle.manifest import Manifest
from diffusette.bundle.manifest_entries import ComponentEntry

ROOT: Final = Path(__file__).resolve().parents[1]
PAGES: Final = sorted(
    page.relative_to(ROOT)
    for pages in (ROOT.glob("*.md"), (ROOT / "docs").rglob("*.md"), (ROOT / "demo").rglob("*.md"))
    for page in pages
)
LINK: Final = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)")
CODE: Final = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# A file or folder of the repository between backquotes: `validate/tolerances.py`. NAME stands for one to come.
NAMED: Final = re.compile(
    r"`((?:benchmarks|bundle|checkpoints|cli|convert|demo|docs|export|quantize|recipes|runtimes|stages|tests|validate)/"
    r"(?!\S*NAME)[\w./-]+)`"
)
# A record of a decision that code or a page cites: docs/decisions/0011 and 0012; (0102); decision 41.
CITED: Final = re.compile(
    r"decisions/(\d{4}(?:(?:, | and |, and )\d{4}\b)*)|\((0\d{3})\)|\b[Dd]ecision (\d+)|\brecord (\d+)\b|\[(0\d{3})\]"
)
HEADINGS: Final = ("Status", "Context", "Decision", "Consequence")
STATUS: Final = re.compile(r"\*\*Status\.\*\* Accepted, 20\d\d-[01]\d-[0-3]\d\.(?: Supersedes (\d+(?:, \d+)*)\.)?")
BUILT: Final = ("build", "dist", "out", "demo-out")
MOST_RECORDS: Final = 25
"""So many a new maintainer reads in an hour. A decision beyond them joins, or replaces, one that is about the same."""
MOST_LINES: Final = 40  # of a record
MOST_COLUMNS: Final = 150
COMMAND: Final = re.compile(r"\bdiffusette (check-goldens|recipe check|[a-z]+)((?: [^`\n#]*)?)")
OPTION: Final = re.compile(r"--[a-z][a-z-]*")


def prose(page: Path) -> str:
    return CODE.sub("", (ROOT / page).read_text())


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[str]:
    for target in LINK.findall(prose(page)):
        if not re.match(r"[a-z]+:", target):
            yield target


def test_the_pages_are_seen() -> None:
    assert {Path("README.md"), Path("docs/index.md"), Path("demo/README.md")} <= set(PAGES)
    assert sum(len(list(links(page))) for page in PAGES) > 80
    assert "a-controlnet" in anchors(Path("docs/checkpoints.md"))


def test_links_of_pages_lead_somewhere() -> None:
    dead = []
    for page in PAGES:
        for target in links(page):
            name, _, anchor = target.partition("#")
            place = (ROOT / page).parent / name if name else ROOT / page
            if not place.exists() or (anchor and anchor not in anchors(place.resolve().relative_to(ROOT))):
                dead.append(f"{page}: {target}")
    assert not dead


def test_files_that_pages_name_exist() -> None:
    named = [(page, name) for page in PAGES for name in NAMED.findall(prose(page))]
    assert len(named) > 50
    assert not [f"{page}: {name}" for page, name in named if not (ROOT / name).exists()]


def test_options_that_pages_show_are_those_of_the_command() -> None:
    """Against docs/cli.md, which `make check` holds against the command line itself."""
    reference = (ROOT / "docs/cli.md").read_text()
    known = {
        found[1]: set(OPTION.findall(found[2]))
        for found in re.finditer(r"^#+ `diffusette ([a-z -]+)`\n(.*?)(?=^#|\Z)", reference, re.MULTILINE | re.DOTALL)
    }
    assert {"convert", "recipe check"} <= known.keys()
    shown = [
        (page, found[1], option)
        for page in PAGES
        for found in COMMAND.finditer((ROOT / page).read_text())
        for option in OPTION.findall(found[2])
    ]
    assert len(shown) > 30
    assert not [
        f"{page}: {command} {option}" for page, command, option in shown if option not in known.get(command, ())
    ]


def test_every_page_is_reached_from_the_index() -> None:
    listed = {Path("docs", target.partition("#")[0]) for target in links(Path("docs/index.md"))}
    assert {page for page in PAGES if page.parent == Path("docs")} - listed == {Path("docs/index.md")}


def test_the_page_of_bundles_explains_every_key_of_a_manifest() -> None:
    page = (ROOT / "docs/bundle.md").read_text()
    keys = [field.alias or name for name, field in Manifest.model_fields.items()] + list(ComponentEntry.model_fields)
    assert not [key for key in keys if f"`{key}`" not in page]


def records() -> dict[int, str]:
    """Number -> text of each record."""
    return {int(file.name[:4]): file.read_text() for file in sorted((ROOT / "docs/decisions").glob("*.md"))}


def texts() -> Iterator[tuple[Path, str]]:
    """Code, pages and settings of the checkout."""
    for folder, below, files in os.walk(ROOT):
        here = Path(folder)
        below[:] = [name for name in below if not name.startswith(".") and not (here == ROOT and name in BUILT)]
        for file in (here / name for name in files):
            if file.suffix in (".md", ".py", ".toml", ".j2") or file.name in ("Makefile", "requirements.txt"):
                yield file.relative_to(ROOT), file.read_text()


def test_records_are_few_and_have_one_form() -> None:
    """CONTRIBUTING.md says the form."""
    assert len(records()) == len(list((ROOT / "docs/decisions").iterdir())) <= MOST_RECORDS
    wrong = []
    for number, text in records().items():
        title, _, *lines = text.splitlines()
        headings = tuple(re.findall(r"^\*\*([A-Z]\w+)\.\*\*", text, re.MULTILINE))
        if not title.startswith(f"# {number}. ") or headings != HEADINGS or not STATUS.fullmatch(lines[0]):
            wrong.append(f"{number}: its title, its status, or its headings {headings}")
        if len(lines) + 2 > MOST_LINES or max(map(len, text.splitlines())) > MOST_COLUMNS:
            wrong.append(f"{number}: it is longer than {MOST_LINES} lines of {MOST_COLUMNS}")
    assert not wrong


def test_a_record_that_another_supersedes_is_gone() -> None:
    gone = [int(number) for text in records().values() for number in re.findall(r"\d+", superseded(text))]
    assert len(gone) == len(set(gone)) > 10
    assert not set(gone) & records().keys()


def superseded(text: str) -> str:
    found = STATUS.search(text)
    return found[1] or "" if found else ""


def test_decisions_that_code_and_pages_cite_exist() -> None:
    cited = [
        (place, int(number))
        for place, text in texts()
        for found in CITED.finditer(text)
        for number in re.findall(r"\d+", found[found.lastindex or 0])
    ]
    assert len(cited) > 80
    assert not [f"{place}: {number}" for place, number in cited if number not in records()]
