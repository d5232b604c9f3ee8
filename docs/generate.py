"""Rewrite the generated parts of README.md and docs/ from the code: `python docs/generate.py [--check]`.

A part stands between `<!-- generated: NAME -->` and `<!-- end generated -->`, NAME being a key of `PARTS`.
With --check nothing is written, and the exit status is 1 when a part is stale.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Final

NAMES: Final = {"sd15": "SD1.5 shapes", "sd21": "SD2.1 shapes", "sdxl": "SDXL shapes"}
ROOT: Final = Path(__file__).resolve().parents[1]
PART: Final = re.compile(
    r"(?P<start><!-- generated: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end generated -->)", re.DOTALL
)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(header)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def commands() -> str:
    """Every command with its arguments and options, as typer itself documents them."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "typer", "diffusette.cli.app", "utils", "docs", "--name", "diffusette"],
        capture_output=True,
        text=True,
        cwd=ROOT / "docs",
    )
    if done.returncode != 0:
        sys.exit(f"typer could not document the command line, status {done.returncode}:\n{done.stderr}")
    _, _, below_title = done.stdout.partition("\n")
    return re.sub(r"^(#+) ", r"\1# ", below_title.strip(), flags=re.MULTILINE) + "\n"


def targets() -> str:
    """Targets against families and precisions: what a target runs, it runs for each of its families."""
    from diffusette.checkpoints.families import FAMILIES
    from diffusette.runtimes.registry import TARGETS, get_target

    rows = []
    for name in TARGETS:
        target = get_target(name)
        supported = ["yes" if family.name in target.families else "-" for family in reversed(FAMILIES)]
        rows.append([f"`{name}`", *supported, ", ".join(sorted(target.precisions)), target.min_runtime])
    families = [family.title.removeprefix("Stable Diffusion ") for family in reversed(FAMILIES)]
    return table(["target", *(f"SD {name}" for name in families), "precisions", "needs runtime"], rows)


def arithmetics() -> str:
    """What an app may choose on each target, in the runtime's own words."""
    from diffusette.runtimes.registry import TARGETS, get_target

    rows = []
    for name in TARGETS:
        for each in get_target(name).arithmetics:
            stated = {
                key: str(value).lower() if isinstance(value, bool) else value for key, value in each.options.items()
            }
            options = [f"`{key} = {value}`" for key, value in stated.items()]
            default = ", the default" if each.is_default else ""
            rows.append([f"`{name}`", f"`{each.name}`{default}", " ".join(options) or "none", each.expects])
    return table(["target", "arithmetic", "options", "computes where a processor can"], rows)


def floors() -> str:
    """What an arithmetic may leave of each component and of a picture."""
    from diffusette.validate.machines.tolerances import FLOORS

    rows = [
        [kind, f"{row.component_db:g} dB", f"{row.last_step_db:g} dB", f"{row.picture_db:g} dB", row.why]
        for kind, row in FLOORS.items()
    ]
    return table(["computes", "component", "UNet", "picture (PSNR)", "why"], rows)


def tolerances() -> str:
    """The gates, with their reasons."""
    from diffusette.validate.tolerances import IMAGE_TOLERANCES, TOLERANCES, ImageTolerance

    def each(name: str) -> str:
        return "every" if name == "*" else f"`{name}`"

    def below(row: ImageTolerance) -> str:
        if row.floor_db is None:
            return ""
        return f", or {row.floor_db:g} and {row.slack_db:g} less than PyTorch with the same weights"

    components = [
        [gate, each(role), each(target), f"`{precision}`", f"SNR {row.min_snr_db:g} dB", row.why]
        for (gate, role, target, precision), row in TOLERANCES.items()
    ]
    pictures = [
        ["picture", "", each(target), f"`{precision}`", f"PSNR {row.min_psnr_db:g} dB{below(row)}", row.why]
        for (target, precision), row in IMAGE_TOLERANCES.items()
    ]
    return table(["gate", "role", "target", "precision", "at least", "because"], components + pictures)


def of_tests(name: str) -> ModuleType:
    """The module `tests.NAME`, whose folder is a package for its imports alone."""
    if "tests" not in sys.modules:
        package = ModuleType("tests")
        package.__path__ = [str(ROOT / "tests")]
        sys.modules["tests"] = package
    return importlib.import_module(f"tests.{name}")


def measured(record: str, row: str) -> list[str]:
    """A cell for each target: what `docs/RECORD.json` says."""
    from diffusette.runtimes.registry import TARGETS

    found = json.loads((ROOT / "docs" / f"{record}.json").read_text()).get(row, {})
    return [
        f"{found[target]['unet_db']:g} / {found[target]['picture_db']:g}" if target in found else "not measured yet"
        for target in TARGETS
    ]


def columns() -> list[str]:
    from diffusette.runtimes.registry import TARGETS

    return [f"`{target}`" for target in TARGETS]


def kinds() -> str:
    """Kinds of checkpoints against targets: what tests/matrix/test_kinds.py measured last."""
    tests = of_tests("kinds")
    titles = {name: kind.title for name, kind in tests.KINDS.items()}
    titles |= {name: title for name, (_, title) in tests.CONTROLLED.items()}
    rows = [[f"`{name}`", title, *measured("kinds", name)] for name, title in titles.items()]
    return table(["kind", "what people call it", *columns()], rows)


def layouts() -> str:
    """Layouts of checkpoints against targets: what tests/matrix/test_inputs.py measured last."""
    return _inputs(merged=False)


def adapters() -> str:
    """Adapters against targets: what tests/matrix/test_inputs.py measured last."""
    return _inputs(merged=True)


def _inputs(merged: bool) -> str:
    rows = [
        [row.title, row.base, *measured("inputs", name)]
        for name, row in of_tests("inputs").INPUTS.items()
        if row.merged == merged
    ]
    return table(["given", "model", *columns()], rows)


def forecasts() -> str:
    """Memory of each stage, forecast and measured, and processor time, a table a run of docs/measured.json."""
    checkpoint = of_tests("convert.shapes").checkpoint
    from diffusette.convert.forecast import forecast
    from diffusette.runtimes.registry import TARGETS

    text = ""
    for run in json.loads((ROOT / "docs" / "measured.json").read_text()):
        source = checkpoint(run["shapes"])
        precisions = dict.fromkeys(source.components, run["precision"])
        told = forecast(source, tuple(TARGETS), precisions, tuple(run["size"]), gate=True)
        rows: dict[str, dict[str, str]] = {}
        for stage in told.stages:
            if stage.label in run["stages"]:
                measured = run["stages"][stage.label]
                component, _, row = stage.label.partition(" ")
                part = component if component in source.components else ""
                cell = f"{stage.peak_mib:.0f} / {measured['mib']:.0f}"
                if measured["cpu_seconds"]:
                    cell += f", {measured['cpu_seconds']:.0f} s"
                rows.setdefault(row if part else stage.label, {})[part] = cell
        height, width = run["size"]
        text += f"\n**{NAMES[run['shapes']]}, {height} x {width}, {run['precision']}**\n\n"
        parts = ("", *source.components)
        head = ["stage", "whole checkpoint", *(f"`{part}`" for part in source.components)]
        text += table(head, ([row, *(cells.get(part, "") for part in parts)] for row, cells in rows.items()))
    return text + "\n"


def rooms() -> str:
    """Which rooms each room imports, as the code has it: every arrow points down, or a test fails."""
    walk = of_tests("test_imports")
    below: dict[str, set[str]] = {room: set() for room in walk.ROOMS}
    for found in walk.IMPORTS:
        here, there = walk.room_of(found.importer), walk.room_of(found.imported)
        if found.own and there in below and there != here:
            below[here].add(there)
    lines = [f"{room:<11} -> {' '.join(other for other in walk.ROOMS if other in below[room])}" for room in walk.ROOMS]
    return "```\n" + "\n".join(line.removesuffix("-> ").rstrip() for line in lines) + "\n```\n"


PARTS: Final[dict[str, Callable[[], str]]] = {
    "adapters": adapters,
    "cli": commands,
    "forecasts": forecasts,
    "kinds": kinds,
    "layouts": layouts,
    "rooms": rooms,
    "targets": targets,
    "tolerances": tolerances,
    "arithmetics": arithmetics,
    "floors": floors,
}


def regenerated(file: Path) -> str:
    """The text that `file` should have."""
    text = file.read_text()
    if text.count("<!-- generated:") != len(PART.findall(text)):
        sys.exit(f"{file.relative_to(ROOT)}: a generated part has no end, or a name that is no word")

    def fill(part: re.Match[str]) -> str:
        if part["name"] not in PARTS:
            sys.exit(f"{file.relative_to(ROOT)}: no generated part {part['name']!r}; known: {', '.join(PARTS)}")
        return part["start"] + PARTS[part["name"]]() + part["end"]

    return PART.sub(fill, text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Rewrite the generated parts of the docs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a part is stale")
    check = parser.parse_args().check
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    stale = {file: text for file in files if (text := regenerated(file)) != file.read_text()}
    for file, text in stale.items():
        if not check:
            file.write_text(text)
        print(f"{file.relative_to(ROOT)}: {'stale' if check else 'rewritten'}", file=sys.stderr)
    if check and stale:
        print("run `make docs`", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
