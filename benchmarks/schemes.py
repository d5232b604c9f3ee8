"""What each scheme costs on each target: size, loss, memory to build and to run, speed. For docs/measurements.md.

    python benchmarks/schemes.py CHECKPOINT RESULTS.json --target ncnn --target mnn --scheme w8c_afp ... [--size HxW]

Every pair of a target and a scheme is converted without its gates, which tells what building alone takes, then with
them, from the cache; then it is profiled, in each of its forms. Its bundle is deleted, its row goes into RESULTS.json
at once, and a pair that fails leaves its reason there and does not stop the others. Rows that are there are not
measured again, so the command can be interrupted; `--again` measures those that failed. The table goes to stdout.
Exits with 1 if a pair failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, Final

from diffusette.bundle.bundle import open_bundle
from diffusette.checkpoints.checkpoint import open_checkpoint
from diffusette.convert.recipe import parameters_of

Row = dict[str, Any]

HEADINGS: Final = (
    "target, scheme",
    "component",
    "bits a weight",
    "MB",
    "to bits x parameters",
    "loss, same weights dB",
    "build MiB",
    "run MiB",
    "time to fp32's",
)


class Failure(Exception):
    """A command that did not do what it was asked for, in its own last words."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("results", type=Path)
    parser.add_argument("--target", action="append", required=True)
    parser.add_argument("--scheme", action="append", required=True)
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--runs", type=int, default=3, help="of each component in `profile`")
    parser.add_argument("--again", action="store_true", help="measure the pairs that failed before once more")
    options = parser.parse_args()
    rows: list[Row] = json.loads(options.results.read_text()) if options.results.is_file() else []
    if options.again:
        rows = [row for row in rows if "failed" not in row]
    known = {(row["target"], row["scheme"]) for row in rows}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    numbers = {
        part: sum(map(prod, shapes.values()))
        for part, shapes in parameters_of(open_checkpoint(options.checkpoint, survey=False)).items()
    }
    for target in options.target:
        for scheme in options.scheme:
            if (target, scheme) in known:
                continue
            place = options.results.with_name(f"{options.results.stem}.{target}.{scheme}")
            row: Row = {"target": target, "scheme": scheme, "size": options.size}
            try:
                row |= measure(options.checkpoint, place, target, scheme, options.size, options.runs, numbers)
            except Failure as failure:
                row["failed"] = str(failure)
                print(f"FAILED {target} {scheme}: {failure}", file=sys.stderr)
            finally:
                for gone in (place, place.with_name(f"{place.name}.rejected")):
                    shutil.rmtree(gone, ignore_errors=True)
            rows.append(row)
            options.results.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    return int(any("failed" in row for row in rows))


def measure(
    checkpoint: str, place: Path, target: str, scheme: str, size: str | None, runs: int, numbers: dict[str, int]
) -> Row:
    """One pair.

    Args:
        place: where the bundle may lie meanwhile.
        numbers: component -> parameters.
    Raises:
        Failure: a command failed, or a gate did.
    """
    pixels = ["--size", size] if size else []
    how = ["convert", checkpoint, "-o", str(place), "--target", target, "--precision", scheme, *pixels]
    alone = diffusette(*how, "--overwrite", "--no-gate")
    proven = diffusette(*how, "--overwrite", accepted=(0, 5))
    (bundle,) = proven["bundles"]
    if not bundle["ok"]:
        raise Failure("; ".join(bundle["parity"]["failures"]))
    manifest = open_bundle(place).manifest
    forms = ["", *sorted({form for part in manifest.components.values() for form in part.forms})]
    profiles = {
        form: diffusette("profile", str(place), "--runs", str(runs), *(["--form", form] if form else []))["components"]
        for form in forms
    }
    took = {stage: taken["memory_mib"] for stage, taken in alone["taken"].items()}
    components = {}
    for part, entry in manifest.components.items():
        parity = bundle["parity"]["components"][part]
        ideal = entry.bits_per_weight * numbers[part] / 8
        bytes_of = {form: sum(f.bytes for f in (entry.forms[form] if form else entry.files)) for form in profiles}
        components[part] = {
            "bits_per_weight": round(entry.bits_per_weight, 3),
            "bytes": bytes_of,
            "to_ideal": {form: round(bytes / ideal, 4) for form, bytes in bytes_of.items()},
            "loss_db": round(parity["snr_db"], 1),
            "same_weights_db": round(parity["fidelity"]["snr_db"], 1) if parity["fidelity"] else None,
            "build_mib": max(mib for stage, mib in took.items() if stage.split()[0] == part),
            "run_mib": {form: profiles[form][part]["peak_rss_mib"] for form in profiles},
            "median_ms": {form: profiles[form][part]["median_ms"] for form in profiles},
            "ratio_to_fp32": {"": manifest.speed[part].ratio_to_fp32, **manifest.speed[part].forms}
            if part in manifest.speed
            else {},
        }
    image = bundle["parity"]["image"]
    pictures = [picture["psnr_db"] for picture in image["pictures"]] if image else []
    return {
        "bundle_bytes": bundle["bytes"],
        "pictures_db": [round(db, 1) for db in sorted(pictures)],
        "of_no_component_mib": {stage: mib for stage, mib in took.items() if stage.split()[0] not in numbers},
        "components": components,
    }


def diffusette(*words: str, accepted: tuple[int, ...] = (0,)) -> Any:
    """The JSON that a command prints; its progress goes to stderr as it comes.

    Raises:
        Failure: its exit code is none of `accepted`; the message is the end of its stderr.
    """
    command = [sys.executable, "-P", "-m", "diffusette", *words, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        last: list[str] = []
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            last = [*last[-5:], line.strip()]
        said = process.stdout.read()
    if process.returncode not in accepted:
        raise Failure(f"exit code {process.returncode}: {' '.join(last)}")
    return json.loads(said)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown; of a model in several forms the default one first."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    return "\n".join([*lines, *(line for row in rows for line in _lines(row))])


def _lines(row: Row) -> Iterator[str]:
    name = f"{row['target']} `{row['scheme']}`"
    if "failed" in row:
        yield f"| {name} | failed: {row['failed'].replace('|', '/')} |{' |' * (len(HEADINGS) - 2)}"
        return
    for part, facts in row["components"].items():
        cells = (
            name,
            part,
            f"{facts['bits_per_weight']:.3f}",
            ", ".join(f"{bytes / 1e6:.1f}" for bytes in facts["bytes"].values()),
            ", ".join(f"{share:.3f}" for share in facts["to_ideal"].values()),
            ", ".join("-" if db is None else f"{db:.1f}" for db in (facts["loss_db"], facts["same_weights_db"])),
            f"{facts['build_mib']:.0f}",
            ", ".join(f"{mib:.0f}" for mib in facts["run_mib"].values()),
            ", ".join(f"{ratio:.2f}" for ratio in facts["ratio_to_fp32"].values()) or "-",
        )
        yield f"| {' | '.join(cells)} |"
    pictures = ", ".join(f"{db:.1f}" for db in row["pictures_db"]) or "none drawn"
    yield f"| {name} | bundle | | {row['bundle_bytes'] / 1e6:.1f} | | pictures {pictures} | | | |"


if __name__ == "__main__":
    sys.exit(main())
