"""What the pages point at is there: files, headings, modules, decisions, keys of a manifest."""

from __future__ import annotations

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
    r"`((?:benchmarks|bundle|checkpoints|cli|demo|docs|export|quantize|recipes|runtimes|stages|tests|validate)/"
    r"(?!\S*NAME)[\w./-]+)`"
)
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
